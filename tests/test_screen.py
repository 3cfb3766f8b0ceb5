"""The exact screens: rows on which int8 ranks wrongly, and equal bits from int8 and float32 screens."""

import os
from contextlib import contextmanager

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from dinofast import ops

native = pytest.importorskip("dinofast._native", reason="built without native kernels")
needs_int8 = pytest.mark.skipif(native.int8_isa() == "baseline", reason="no int8 instructions here")


@contextmanager
def isa(name):
    before = os.environ.get("DINOFAST_ISA")
    os.environ["DINOFAST_ISA"] = name
    try:
        yield
    finally:
        del os.environ["DINOFAST_ISA"]
        if before is not None:
            os.environ["DINOFAST_ISA"] = before


def assert_screens_agree(call, rows, columns):
    """Hold the int8 screen to the float32 screen of the same instructions, bit for bit."""
    with isa("avx512"):
        wide = call(rows, columns)
    with isa(native.int8_isa()):
        narrow = call(rows, columns)
    for left, right in zip(wide, narrow, strict=True):
        assert torch.equal(left.nan_to_num(7), right.nan_to_num(7))
    return narrow


def center_of(columns):
    k = len(columns)
    return columns[[k * s // min(k, 16) for s in range(min(k, 16))]].double().mean(0)


def int8_misranks(rows, columns, center):
    """Tell for each row whether the codes alone, centered and scaled as in the screen, name a worse column.

    The screen's score is the product of the codes of row - center and column - center, plus center·column or
    minus half the column's squared distance from the center, which orders unit columns the same.
    """

    def codes(x):
        gap = x.double() - center
        scale = gap.abs().amax(1, keepdim=True) / 127
        return (gap / scale).round() * scale

    gap = columns.double() - center
    score = codes(rows) @ codes(columns).T - gap.square().sum(1) / 2
    true = (rows.double()[:, None] - columns.double()).square().sum(2)
    return true.gather(1, score.argmax(1, keepdim=True))[:, 0] > true.amin(1) + 1e-6


def near_ties(d, k, seed, common):
    """Draw columns that differ by less than half a step of their codes, and rows among them.

    One large channel, of either sign so that the center does not take it away, makes the step coarse; the
    differences stand in the other channels. `common` is the squared norm, in units of that channel's, of
    what all have in common: the center.
    """
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(d, generator=generator, dtype=torch.float64)
    base *= 40 * common**0.5 / base.norm()
    columns = base + 0.05 * torch.randn(k, d, generator=generator, dtype=torch.float64)
    columns[:, 0] = 40 * (-1) ** torch.arange(k)
    columns[:, 1:] *= 0.98 + 0.02 * torch.rand(k, 1, generator=generator, dtype=torch.float64)
    rows = base + 0.05 * torch.randn(64, d, generator=generator, dtype=torch.float64)
    rows[:, 0] = 30 * (-1) ** torch.arange(64)
    return rows.float(), columns.float()


@needs_int8
@pytest.mark.parametrize("call", [ops.cosine_max, ops.kmeans_step])
@pytest.mark.parametrize("common", [0.25, 3])
@pytest.mark.parametrize(("d", "k"), [(33, 20), (64, 150), (130, 700), (384, 150), (384, 1100)])
def test_columns_that_int8_ranks_wrongly(call, d, k, common):
    rows, columns = near_ties(d, k, d + k, common)
    spread = columns
    if call is ops.cosine_max:
        unit = torch.nn.functional.normalize
        spread = columns * torch.linspace(0.5, 2, k)[:, None]
        center = center_of(unit(spread))
        centered = bool(center.square().sum() > 0.5)  # of short centers the screen makes none
        assert centered == (common == 3)
        assert bool(int8_misranks(unit(rows), unit(spread), center * centered).any())
    else:
        assert bool(int8_misranks(rows, columns, center_of(columns)).any())
    found = assert_screens_agree(call, rows, spread)
    wide, true = rows.double(), spread.double()
    if call is ops.cosine_max:
        cosine = torch.nn.functional.normalize(wide) @ torch.nn.functional.normalize(true).T
        value, best, named = found[0], cosine.amax(1), cosine.gather(1, found[1][:, None])[:, 0]
    else:
        gaps = (wide[:, None] - true).square().sum(2)
        value, best, named = found[1], gaps.amin(1), gaps.gather(1, found[0][:, None])[:, 0]
    torch.testing.assert_close(value.double(), best, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(named, best, rtol=1e-6, atol=1e-6)


@needs_int8
@pytest.mark.parametrize("scale", [1.0, 3e-5, 4e4])
def test_what_the_codes_of_a_row_leave_out_decides_as_far_as_the_bound_allows(scale):
    """The codes of all columns are exact, those of the row are 127 in one channel and 0 in all others.

    By them the row scores with its best column below the true value of the second by 0.92 of
    |rest| · |column|, the most that the screen may add.
    """
    d, generator = 384, torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (d - 9,), generator=generator) * 2.0 - 1
    row, best, second = torch.zeros(3, d)
    row[0] = best[0] = second[0] = 127
    row[9:], best[9:], second[1:9] = 0.45 * signs, 20 * signs, 111
    others = torch.randint(-127, 127, (30, d), generator=generator).float()
    others[:, 0] = -127
    columns = torch.stack([*others[:15], second, *others[15:], best])
    cosine = torch.nn.functional.cosine_similarity(row.double(), columns.double())
    assert cosine.topk(2).indices.tolist() == [31, 15]
    lost = row.double() - row.double().round()
    left = cosine[15] - (row.double() - lost) @ best.double() / row.double().norm() / best.double().norm()
    assert 0.9 < left / (lost.norm() / row.double().norm()) < 0.95
    similarity, index = assert_screens_agree(ops.cosine_max, scale * row.repeat(40, 1), columns)
    assert index.tolist() == [31] * 40
    torch.testing.assert_close(similarity[0].double(), cosine[31], rtol=0, atol=1e-6)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [40, 48, 384])
def test_rows_of_any_norm_are_coded_with_what_brings_them_to_unit_norm(d, dtype):
    generator = torch.Generator().manual_seed(d)
    rows = torch.randn(90, d, generator=generator) * 10 ** torch.linspace(-37, 36, 90)[:, None]
    rows[[13, 50]] = 0
    columns = torch.randn(40, d, generator=generator)
    rows[60:63] = 3e7 * (columns[7] + 1e-3 * torch.randn(3, d, generator=generator))
    columns[8] = columns[7] * (1 + 1e-3 * torch.randn(d, generator=generator))
    similarity, index = assert_screens_agree(ops.cosine_max, rows.to(dtype), columns.to(dtype))
    unit = torch.nn.functional.normalize
    wide, true = rows.to(dtype).double(), columns.to(dtype).double()
    cosine = unit(wide, eps=1e-60) @ unit(true).T
    torch.testing.assert_close(similarity.double(), cosine.amax(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(cosine.gather(1, index[:, None])[:, 0], cosine.amax(1), rtol=0, atol=1e-6)


@needs_int8
@pytest.mark.parametrize("call", [ops.cosine_max, ops.kmeans_step])
def test_a_column_worse_by_one_code_step_never_wins(call):
    """Column 1 is the row itself; every other is off in one channel by less than its code tells."""
    row = torch.linspace(-0.01, 0.01, 384)[None]
    row[0, 0] = 1
    columns = row.repeat(150, 1)
    columns[torch.arange(150), torch.arange(1, 151)] += 0.003
    columns[1] = row
    columns = torch.cat([columns, -columns])  # or the common part would leave with the center
    found = assert_screens_agree(call, row.repeat(40, 1), columns)
    index = found[1] if call is ops.cosine_max else found[0]
    assert index.tolist() == [1] * 40


@needs_int8
@pytest.mark.parametrize("call", [ops.cosine_max, ops.kmeans_step])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_screens_agree_on_anything(call, data):
    d = data.draw(st.integers(32, 140))
    n, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 100))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20)))

    def draw(count):
        spread = 10 ** data.draw(st.sampled_from([-8.0, -3.0, -1.0, 0.0]))
        scale = 10 ** data.draw(st.sampled_from([-30.0, -13.0, -11.0, 0.0, 11.0, 13.0, 16.0]))
        x = torch.randn(1, d, generator=generator) + spread * torch.randn(count, d, generator=generator)
        x[:, data.draw(st.integers(0, d - 1))] *= data.draw(st.sampled_from([0.0, 1.0, 1e4]))
        return x * scale

    rows, columns = draw(n), draw(k)
    if data.draw(st.booleans()):
        rows[n // 2] = columns[k // 2]
    if data.draw(st.booleans()):
        columns[k - 1] = columns[0]
    if data.draw(st.booleans()):
        rows[0, d - 1] = data.draw(st.sampled_from([torch.nan, torch.inf, 1e38]))
    if data.draw(st.booleans()):
        columns[k // 3] *= 1e3
    if data.draw(st.booleans()):
        rows[n - 1] = 0
    assert_screens_agree(call, rows, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kmeans_step_has_the_same_bits_for_any_number_of_threads(restored_threads, dtype):
    rows, centers = torch.randn(3000, 200).to(dtype), torch.randn(70, 200)
    rows[17, 3] = torch.nan
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ops.kmeans_step(rows, centers))
    for other in found[1:]:
        assert all(
            torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(other, found[0], strict=True)
        )


@pytest.mark.parametrize("name", native.available_isas())
def test_kmeans_step_on_every_instruction_set(name):
    from dinofast.ops.registry import OPS
    from dinofast.testing import assert_kernel, cast_inputs

    op = OPS["kmeans_step"]
    kernel = next(kernel for kernel in op.kernels if kernel.backend == "cpu")
    with isa(name):
        for sample in op.samples():
            for dtype in (torch.float32, torch.float16):
                assert_kernel(op, kernel, cast_inputs(op, sample.args, dtype))
        rows, centers = torch.randn(60, 4096), torch.randn(1100, 4096)  # more than one block of centers
        centers[900] = centers[37]
        rows[:3] = centers[[900, 1099, 37]]
        assert_kernel(op, kernel, (rows, centers))


@needs_int8
@pytest.mark.parametrize("step", [0.0, 1e-7, 1e-4])
def test_nearly_equal_columns_have_the_same_bits_for_any_screen_and_threads(restored_threads, step):
    generator = torch.Generator().manual_seed(1)
    rows, base = torch.randn(300, 130, generator=generator), torch.randn(1, 130, generator=generator)
    columns = base + step * torch.randn(90, 130, generator=generator)
    columns[[7, 50]] = columns[3].clone()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(assert_screens_agree(ops.cosine_max, rows, columns))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    cosine = torch.nn.functional.normalize(rows.double()) @ torch.nn.functional.normalize(columns.double()).T
    similarity, index = found[0]
    torch.testing.assert_close(similarity.double(), cosine.amax(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(cosine.gather(1, index[:, None])[:, 0], cosine.amax(1), rtol=0, atol=1e-6)
    assert not bool(((index == 7) | (index == 50)).any())
    if step == 0:
        assert not bool(index.any())


@pytest.mark.parametrize("name", native.available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("d", "k"), [(33, 1), (384, 2), (100, 15), (64, 16), (64, 17)])
def test_few_columns_of_any_scale(name, dtype, d, k):
    generator = torch.Generator().manual_seed(k)
    rows = torch.randn(50, d, generator=generator) * 10.0 ** torch.linspace(-36, 36, 50)[:, None]
    columns = torch.randn(k, d, generator=generator) * 10.0 ** torch.linspace(-30, 30, k)[:, None]
    rows[3], rows[4, d - 1], rows[5, 0] = 0, torch.nan, torch.inf
    rows[6] = columns[k - 1] = columns[0].clone()
    rows, columns = rows.to(dtype), columns.to(dtype)
    with isa(name):
        similarity, index = ops.cosine_max(rows, columns)
    unit = torch.nn.functional.normalize
    cosine = unit(rows.double(), eps=1e-300) @ unit(columns.double(), eps=1e-300).T
    cosine[4:6] = torch.nan
    torch.testing.assert_close(similarity.double(), cosine.amax(1), rtol=0, atol=1e-6, equal_nan=True)
    assert index[3:7].tolist() == [0, 0, 0, 0]
    whole = ~cosine[:, 0].isnan()
    named = cosine.gather(1, index[:, None])[whole, 0]
    torch.testing.assert_close(named, cosine[whole].amax(1), rtol=0, atol=1e-6)
    columns[k // 2, 0] = torch.nan
    with isa(name):
        similarity, index = ops.cosine_max(rows, columns)
    assert bool(similarity.isnan().all())
    assert not bool(index.any())


@pytest.mark.parametrize("k", [17, 18, 19, 151, 300])
def test_rows_that_decide_all_columns_see_no_columns_behind_the_last(isa, k):
    """Nearly equal columns, then a last group of another direction; the last one is the best of many rows."""
    draw = torch.Generator().manual_seed(k)
    one, other = torch.nn.functional.normalize(torch.randn(2, 384, generator=draw))
    columns = one + 1e-6 * torch.randn(k, 384, generator=draw)
    columns[256:] += other - one
    mixed = torch.where(torch.rand(400, 1, generator=draw) > 0.5, 0.9 * one, 0.3 * one + 0.6 * other)
    rows = torch.cat([mixed + 0.02 * torch.randn(400, 384, generator=draw), columns[-1:].repeat(40, 1)])
    value, index = ops.cosine_max(rows, columns)
    cosine = torch.nn.functional.normalize(rows.double()) @ torch.nn.functional.normalize(columns.double()).T
    torch.testing.assert_close(value.double(), cosine.amax(1), rtol=0, atol=1e-6)
    reached = cosine.gather(1, index[:, None])[:, 0]
    torch.testing.assert_close(reached, cosine.amax(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("call", [ops.cosine_max, ops.kmeans_step])
def test_columns_alike_in_all_but_small_channels_are_told_apart(call):
    """Their products with most rows round to one number; equal ones among them count once."""
    draw = torch.Generator().manual_seed(0)
    columns = torch.zeros(900, 40)
    columns[:, 0] = 2.0**20
    columns[:, 1:] = torch.randn(900, 39, generator=draw).sign()
    columns[600:] = columns[:300]
    found = call(columns.clone(), columns)
    index = found[1] if call is ops.cosine_max else found[0]
    _, kind = torch.unique(columns, dim=0, return_inverse=True)
    first = torch.full_like(kind, 900).scatter_reduce_(0, kind, torch.arange(900), "amin")
    first = first[kind]
    assert len(set(first.tolist())) == 600
    if call is ops.kmeans_step:
        assert torch.equal(index, first)
    assert set(index.tolist()) <= set(first.tolist())


def test_more_rows_than_native_row_numbers_hold_are_refused():
    """No memory lies behind these rows, so nothing may read them."""
    many, few = torch.zeros(1, 1).expand(1 << 31, 1), torch.zeros(3, 1)
    [kernel] = [k for k in ops.OPS["kmeans_step"].kernels if k.backend == "cpu"]
    assert kernel.refuse(few, few) is None
    assert "wants float32, bfloat16 or float16" in kernel.refuse(few.double(), few.double())
    assert "fewer than 2**31 rows, got 2147483648 and 3" in kernel.refuse(many, few)
    assert "fewer than 2**31 rows, got 3 and 2147483648" in kernel.refuse(few, many)


@needs_int8
def test_rows_next_to_the_center_find_the_nearest_column():
    """Where a row has no codes, a norm that is only bounded would set the limit for columns too high."""
    columns = torch.zeros(4, 64)
    columns[0, 0], columns[1, 1] = 1.8e-12, 2e-12
    columns[2:] = -columns[:2]  # so that their mean, the center, is zero
    rows = 0.4 * columns[1].repeat(13, 1)
    index = assert_screens_agree(ops.kmeans_step, rows, columns)[0]
    assert index.tolist() == [1] * 13
