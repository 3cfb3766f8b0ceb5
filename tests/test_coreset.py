"""The coreset: the plain algorithm in ten lines of NumPy decides what is selected."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dinofast import ops
from dinofast.errors import InputError
from dinofast.models.coreset import _jl_channels, k_center
from dinofast.ops.registry import MISSING

native = pytest.mark.skipif("cpu" in MISSING, reason="built without native kernels")


def plain(rows, k, start, seed):
    rows, order = rows.numpy(), torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(seed))
    to = lambda i: np.sqrt(((rows - rows[i]).astype(np.float64) ** 2).sum(1)).astype(np.float32)  # noqa: E731
    starts = order[: 10 if start == "mean-of-10" else 1].tolist()
    if start == "distance-norm":
        starts = [int(np.argmax([(to(i).astype(np.float64) ** 2).sum() for i in range(len(rows))]))]
    gap = (sum(to(i).astype(np.float64) for i in starts) / len(starts)).astype(np.float32)
    selected = [] if start == "mean-of-10" else starts
    gap[selected] = -1
    while len(selected) < k:
        selected.append(int(gap.argmax()))
        gap = np.minimum(gap, to(selected[-1]))
        gap[selected[-1]] = -1
    return selected


def data(kind, n=700, d=24):
    rows = torch.randn(n, d)
    if kind == "clustered":
        rows = 5 * torch.randn(9, d)[torch.arange(n) % 9] + 0.3 * rows
    if kind == "duplicates":
        rows = rows[torch.arange(n) % 40]
    if kind == "whole numbers":
        rows = rows[:, :3].mul(2).round()
    if kind == "large and small":
        rows = rows * 10 ** torch.linspace(-25, 25, n)[:, None]
    if kind == "tiny":
        rows = rows * 1e-24
    if kind == "far from the origin":
        rows = rows + 3000
    return rows


KINDS = (
    "random", "clustered", "duplicates", "whole numbers", "large and small", "tiny", "far from the origin",
)  # fmt: skip


@pytest.mark.parametrize("start", ["random-row", "mean-of-10", "distance-norm"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=native), "reference"])
def test_selects_what_the_plain_algorithm_selects(backend, kind, start):
    rows = data(kind)
    for seed in range(3):
        with ops.backend(backend):
            assert k_center(rows, 150, start=start, seed=seed).tolist() == plain(rows, 150, start, seed)


@native
@pytest.mark.parametrize("start", ["random-row", "mean-of-10"])
def test_every_instruction_set_and_number_of_threads(monkeypatch, start):
    from dinofast import _native

    rows = torch.cat([data("random", 12000, 96), data("clustered", 3000, 96)])  # enough for threads to wake
    expected = plain(rows, 200, start, 5)
    before = torch.get_num_threads()
    try:
        for isa in _native.available_isas():
            monkeypatch.setenv("DINOFAST_ISA", isa)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert k_center(rows, 200, start=start, seed=5).tolist() == expected
    finally:
        torch.set_num_threads(before)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    n=st.integers(1, 150),
    d=st.integers(1, 40),
    share=st.floats(0, 1),
    distinct=st.integers(1, 150),
    scale=st.sampled_from([1e-40, 1e-19, 1.0, 1e15]),
    start=st.sampled_from(["random-row", "mean-of-10"]),
    seed=st.integers(0, 9),
)
def test_any_shape(n, d, share, distinct, scale, start, seed):
    rows = (
        torch.randn(n, d, generator=torch.Generator().manual_seed(seed))[torch.arange(n) % distinct] * scale
    )
    k = max(1, int(share * n))
    assert k_center(rows, k, start=start, seed=seed).tolist() == plain(rows, k, start, seed)


@pytest.mark.parametrize("start", ["random-row", "mean-of-10"])
def test_all_rows_give_a_permutation_and_duplicates_come_last(start):
    rows = torch.randn(40, 3)[torch.arange(100) % 40]
    index = k_center(rows, 100, start=start)
    assert sorted(index.tolist()) == list(range(100))
    assert len({tuple(row) for row in rows[index[:40]].tolist()}) == 40
    assert index[40:].tolist() == sorted(index[40:].tolist())


def test_one_row_of_one():
    for start in ("random-row", "mean-of-10"):
        assert k_center(torch.ones(1, 1), 1, start=start).tolist() == [0]
        assert k_center(torch.ones(1, 1), ratio=1.0, start=start).tolist() == [0]


def test_ratio_is_rounded_down_and_strided_half_rows_are_served():
    rows = torch.randn(59, 20)
    assert k_center(rows, ratio=0.1).shape == (5,)
    strided = rows.to(torch.bfloat16)[:, ::2]
    assert k_center(strided, 20).tolist() == k_center(strided.float().contiguous(), 20).tolist()


def test_seed_decides():
    rows = torch.randn(200, 8)
    assert torch.equal(k_center(rows, 20, seed=3), k_center(rows, 20, seed=3))
    assert len({tuple(k_center(rows, 20, seed=seed).tolist()) for seed in range(5)}) > 1


@pytest.mark.parametrize("projection", ["linear-128", "sparse-jl"])
def test_a_projection_changes_distances_a_little(projection):
    rows = torch.randn(300, 700) * torch.linspace(0.1, 4, 300)[:, None]
    index = k_center(rows, 30, projection=projection, seed=1)
    exact = k_center(rows, 30, seed=1)
    assert index.tolist() != exact.tolist()
    radius = [torch.cdist(rows, rows[i]).amin(1).max() for i in (index, exact)]
    assert radius[0] < 1.25 * radius[1]
    assert torch.equal(index, k_center(rows, 30, projection=projection, seed=1))


def test_projections_that_would_not_shrink_are_skipped():
    assert [_jl_channels(n) for n in (100_000, 1_000_000, 7_680_000)] == [284, 341, 391]
    rows = torch.randn(300, 128)
    assert torch.equal(k_center(rows, 30, projection="linear-128"), k_center(rows, 30))
    assert torch.equal(k_center(rows, 30, projection="sparse-jl"), k_center(rows, 30))


@pytest.mark.parametrize("start", ["random-row", "mean-of-10"])
def test_progress_begins_at_zero_and_ends_at_k(start):
    seen = []
    k_center(torch.randn(900, 4), 450, start=start, progress=lambda *args: seen.append(args))
    done = [count for _, count, _ in seen]
    assert done[0] == 0
    assert done[-1] == 450
    assert done == sorted(done)
    assert 50 < len(done) < 150
    assert {(stage, total) for stage, _, total in seen} == {("coreset", 450)}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_rows_are_refused_with_the_first_named(value):
    rows = torch.randn(50, 4)
    rows[31, 2] = rows[17, 3] = value
    with pytest.raises(InputError, match="row 17 holds NaN or inf"):
        k_center(rows, 5)
    with pytest.raises(InputError, match="row 3 holds NaN or inf \\(as float32\\)"):
        k_center(torch.full((5, 2), 1.0, dtype=torch.float64).index_fill(0, torch.tensor(3), 1e200), 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: k_center(torch.ones(9, 2), ratio=0.1), "ratio 0.1 of 9 rows selects none"),
        (lambda: k_center(torch.ones(9, 2), ratio=0.0), "ratio must be in \\(0, 1\\], got 0.0"),
        (lambda: k_center(torch.ones(9, 2), ratio=1.5), "ratio must be in \\(0, 1\\], got 1.5"),
        (lambda: k_center(torch.ones(9, 2), 0), "n_select must be in \\[1, 9\\]"),
        (lambda: k_center(torch.ones(9, 2), 10), "n_select must be in \\[1, 9\\]"),
        (lambda: k_center(torch.ones(9, 2)), "give n_select or ratio"),
        (lambda: k_center(torch.ones(9, 2), 3, ratio=0.5), "give n_select or ratio"),
        (lambda: k_center(torch.ones(9, 2), 3, start="first"), "unknown start 'first'; one of random-row"),
        (lambda: k_center(torch.ones(9, 2), 3, projection="pca"), "unknown projection 'pca'; one of None"),
        (lambda: k_center(torch.ones(0, 2), 3), "rows must be a floating-point matrix"),
        (lambda: k_center(torch.ones(9, 2).int(), 3), "rows must be a floating-point matrix"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call()
