"""Bank: every strategy gives the same bits, the bounds hold, bad input is refused, files come back."""

import copy
import math
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinofast import artifact
from dinofast.errors import ArtifactError, InputError
from dinofast.ops import Bank, knn_topk, mapped_rows, providers
from dinofast.ops.bank_choice import knn_bank
from dinofast.ops.bank_forms import group, pack
from dinofast.ops.knn_topk import METRICS
from dinofast.ops.knn_topk_bank import BOTH, CODED, PANEL, forms_of

native = pytest.importorskip("dinofast._native", reason="built without native kernels")
ISAS = native.available_isas()
EXACT = ("float32", "lowp", "pruned")


def forms(rows, metric):
    """The prepared forms of every exact strategy, whatever the processor has."""
    (one,) = Bank(rows, metric, "float32").packed
    return {
        "float32": [one],
        "lowp": pack(one, metric, None),
        "pruned": pack(one, metric, group(one, 0)),
        "auto": pack(one, metric, group(one, 0), codes=False),
    }


def assert_same(queries, rows, k, metric):
    """Every strategy gives the bits of the plain search."""
    expected = knn_topk(queries, rows, k, metric)
    for name, packed in forms(rows, metric).items():
        found = knn_bank(queries, packed, k, metric, 0)
        for got, want in zip(found, expected, strict=False):
            assert got.numpy().tobytes() == want.numpy().tobytes(), (name, metric)


def clustered(count, d, spread=0.3, clusters=12):
    centers = torch.randn(clusters, d, generator=torch.Generator().manual_seed(3)) * 2
    return centers[torch.randint(clusters, (count,))] + spread * torch.randn(count, d)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 5, 64])
def test_strategies_agree_bit_for_bit(isa, metric, k):
    assert_same(torch.randn(70, 50), torch.randn(3000, 50), k, metric)
    assert_same(clustered(70, 65), clustered(3000, 65), k, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_strategies_agree_on_adversarial_rows(isa, metric):
    """One huge channel makes int8 codes useless for the rest; ties, duplicates, zero rows, offsets, tails."""
    spike = torch.randn(900, 33)
    spike[::3, 5] = 100
    few = torch.randn(7, 33)[torch.randint(7, (900,))]
    zero = torch.randn(900, 33)
    zero[::50] = 0
    offset = torch.randn(900, 33) * 0.01 + 50
    norms = torch.randn(900, 33) * 10.0 ** torch.linspace(-10, 10, 900)[:, None]
    for rows in (spike, few, zero, offset, norms):
        queries = torch.cat([rows[::40], rows[3::40] + 1e-4, torch.randn(5, 33)])
        assert_same(queries, rows, 3, metric)
    assert_same(torch.randn(3, 1), torch.randn(90, 1), 2, metric)
    huge = torch.randn(100, 3) * 1e30
    if metric != "sqeuclidean":
        assert_same(huge[:4] + 1, huge, 2, metric)


@pytest.mark.parametrize("k", [1, 4])
def test_a_rough_look_rules_out_no_near_tie(isa, k):
    """Distances nearly equal, some of them sums of many equal squares, whose roundings add up in float32."""
    rows = torch.zeros(40, 6000)
    for i, row in enumerate(rows):
        row[: 6000 // (1 + i % 7) ** 2] = 0.37 + 0.61 * i
    rows *= (1 + 4e-6 * torch.rand(40, 1, dtype=torch.float64)) / rows.double().norm(dim=1, keepdim=True)
    for metric in ("sqeuclidean", "euclidean"):
        assert_same(torch.zeros(3, 6000), rows, k, metric)


def test_auto_keeps_no_codes_of_grouped_rows():
    rows = clustered(6000, 64, spread=0.05, clusters=60)
    lean, fast, coded = (Bank(rows, strategy=s) for s in ("auto", "pruned", "lowp"))
    assert lean.strategy == fast.strategy == "pruned"
    extra = [sum(x.nbytes for x in bank.packed[1:]) for bank in (lean, fast)]
    assert extra[0] < extra[1] - 6000 * 64
    queries = clustered(50, 64, spread=0.05, clusters=60)
    for got, want in zip(knn_topk(queries, lean, 3), knn_topk(queries, fast, 3), strict=True):
        assert torch.equal(got, want)
    assert len(coded.packed) in (1, len(CODED))
    if len(coded.packed) > 1:
        assert sum(x.nbytes for x in coded.packed[1:]) < 6000 * (64 + 9)


NUMBERS = st.one_of(st.sampled_from([0.0, -0.0, 1.0, 1e-40, 1e-20, 127.0, 1e10]), st.floats(-4, 4, width=32))


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(data=st.data(), metric=st.sampled_from(METRICS), isa=st.sampled_from(ISAS))
def test_drawn_banks(data, metric, isa):
    d, m, q = (data.draw(st.integers(1, high)) for high in (20, 60, 14))
    k = data.draw(st.integers(1, m))
    numbers = torch.tensor(data.draw(st.lists(NUMBERS, min_size=d, max_size=4 * d)))
    picks = data.draw(st.lists(st.integers(0, len(numbers) - d), min_size=m + q, max_size=m + q))
    drawn = torch.stack([numbers[i : i + d] for i in picks])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DINOFAST_ISA", isa)
        assert_same(drawn[m:], drawn[:m], k, metric)


def test_the_bound_on_the_quantization_error_holds_and_is_not_idle():
    """score + error of both sides is above the true score, score − 2 · error below; and not by much."""
    rows = torch.nn.functional.normalize(clustered(500, 384))
    packed = SimpleNamespace(**forms_of(pack(rows, "cosine", None)))
    codes = packed.codes.view(-1, 96, 32, 4).permute(0, 2, 1, 3).reshape(-1, 384).double() - 128
    approximate = codes * packed.scale.double()[:, None]
    centered = (rows - packed.center).double()
    truth = centered @ centered.T - centered.square().sum(1) / 2
    upper = approximate @ approximate.T + packed.bias.double()
    assert approximate.shape[0] == 512
    error = packed.error.double().repeat_interleave(PANEL)  # rows are their own queries, with the same part
    upper, error = upper[:500, :500], error[:500]
    assert bool((upper + error[:, None] >= truth).all())
    assert bool((upper - 2 * error - error[:, None] <= truth).all())
    assert float((upper - error - truth).abs().max()) > 0.02 * float(error.max())


@pytest.mark.parametrize("strategy", ["lowp", "pruned", "approximate"])
def test_the_same_for_any_number_of_threads(restored_threads, strategy):
    queries, bank = clustered(300, 40), Bank(clustered(5000, 40), "euclidean", strategy)
    found, shares = [], []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(knn_topk(queries, bank, 3, "euclidean"))
        shares.append(bank.visited_share)
    for distance, index in found[1:]:
        assert torch.equal(distance, found[0][0])
        assert torch.equal(index, found[0][1])
    assert shares == [shares[0]] * 3


def test_pruned_visits_few_rows_of_clustered_banks():
    bank = Bank(clustered(20_000, 64, spread=0.1, clusters=50), strategy="pruned")
    assert math.isnan(bank.visited_share)
    knn_topk(clustered(500, 64, spread=0.1, clusters=50), bank)
    assert 0 < bank.visited_share < 0.2


def test_auto_follows_its_rules(monkeypatch):
    assert Bank(torch.randn(100, 8)).strategy == "float32"
    loose, tight = torch.randn(17_000, 64), clustered(17_000, 64, spread=0.05, clusters=60)
    assert Bank(tight).strategy == "pruned"
    assert Bank(tight).reason.startswith("a search visits")
    for has, expected in ((True, "lowp"), (False, "float32")):
        monkeypatch.setattr(providers, "has_int8", lambda has=has: has)
        assert Bank(loose).strategy == expected
        assert Bank(loose[:5000]).strategy == expected
        assert Bank(loose, strategy="lowp").strategy == expected
    assert Bank(loose, strategy="lowp").reason == "this processor has no int8 instructions"
    assert_same(loose[:20], Bank(loose).rows, 2, "euclidean")


def test_approximate_reports_its_recall():
    tight = Bank(clustered(5000, 64, spread=0.05, clusters=60), strategy="approximate")
    assert tight.strategy == "approximate"
    assert tight.recall > 0.95
    loose = Bank(torch.randn(5000, 64), strategy="approximate")
    assert 0 < loose.recall < 0.9
    distance, index = knn_topk(torch.randn(30, 64), loose, 64)
    assert bool(distance.isfinite().all())
    assert bool((index >= 0).all())
    assert all(Bank(torch.randn(50, 4), strategy=s).recall == 1 for s in EXACT)


def test_an_approximate_bank_of_one_row():
    """It has no other row to miss; it may grow, and shrink to one again."""
    bank = Bank(torch.randn(1, 8), strategy="approximate")
    assert bank.recall == 1
    assert bank.strategy == "approximate"
    assert bank.add(torch.randn(3, 8)).recall > 0
    assert bank.remove(torch.arange(3)).recall == 1
    assert knn_topk(torch.randn(2, 8), bank)[1].tolist() == [[0], [0]]


def test_a_bank_that_cannot_be_prepared_anew_stays_as_it_was(monkeypatch):
    bank = Bank(clustered(300, 8), strategy="approximate")
    before, recall = bank.packed, bank.recall
    monkeypatch.setattr(Bank, "_measure_recall", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bank.add(torch.randn(3, 8))
    assert bank.packed is before
    assert (len(bank), bank.recall) == (300, recall)


def test_add_and_remove_equal_a_new_bank():
    rows, more, queries = torch.randn(600, 20), torch.randn(70, 20), torch.randn(9, 20)
    for strategy in EXACT:
        bank = Bank(rows, "euclidean", strategy).add(more)
        assert len(bank) == 670
        bank.remove(torch.tensor([0, 5, 669, 5]))
        kept = torch.cat([rows, more])[[i for i in range(670) if i not in (0, 5, 669)]]
        assert len(bank) == 667
        got, want = knn_topk(queries, bank, 4, "euclidean"), knn_topk(queries, kept, 4, "euclidean")
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        assert bank.build_seconds > 0
        assert bank.nbytes >= 667 * 20 * 4


@pytest.mark.parametrize("strategy", [*EXACT, "approximate"])
def test_save_and_load_keep_every_number(tmp_path, strategy):
    bank = Bank(clustered(700, 21), "cosine", strategy)
    bank.save(tmp_path / "bank.safetensors")
    loaded = Bank.load(tmp_path / "bank.safetensors")
    for name in ("metric", "strategy", "reason", "recall", "nbytes"):
        assert getattr(loaded, name) == getattr(bank, name)
    assert all(torch.equal(a, b) for a, b in zip(loaded.packed, bank.packed, strict=True))
    queries = torch.randn(7, 21)
    assert torch.equal(knn_topk(queries, loaded)[0], knn_topk(queries, bank)[0])
    assert len(loaded.add(torch.ones(1, 21))) == 701
    bank.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "bank.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"rows": torch.tensor([[10**9, 0]])}, {}, "must be a floating-point matrix, got torch.int64"),
        ({"rows": torch.eye(2).double()}, {}, "rows must be contiguous float32, got torch.float64"),
        ({"rows": torch.ones(2)}, {}, r"must be a floating-point matrix, got torch.float32 \(2,\)"),
        ({"rows": torch.ones(0, 2)}, {}, "no rows or no channels"),
        ({"rows": torch.tensor([[1, 0], [math.nan, 1]])}, {}, "row 1 holds NaN or inf"),
        ({"rows": torch.tensor([[1.0, 0], [0, 0], [0, 2]])}, {}, r"norm of row 2 is \+1 off 1"),
        ({"rows": torch.eye(2), "row": torch.tensor([10**9])}, {}, r"holds \['row', 'rows'\]"),
        ({"x": torch.eye(2)}, {}, r"holds \['x'\]"),
        ({}, {"metric": "l2"}, "unknown metric 'l2'"),
        ({}, {"metric": ["cosine"]}, "unknown metric"),
        ({}, {"strategy": 3}, "unknown strategy 3"),
        ({}, {"seed": "0"}, "seed must be an integer of 64 bits, got '0'"),
        ({}, {"seed": 1 << 64}, "seed must be"),
        ({}, {"seed": None}, "seed must be"),
        ({}, {"recall": 1}, "'recall'"),
    ],
)
def test_a_tampered_file_is_refused(tmp_path, tensors, config, message):
    path = tmp_path / "bank"
    config = {"metric": "cosine", "strategy": "pruned", "seed": 0, **config}
    artifact.write(path, "bank", tensors or {"rows": torch.eye(2)}, config)
    with pytest.raises(ArtifactError, match=rf"bank: .*{message}.*; save the bank again") as caught:
        Bank.load(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("missing", ["metric", "strategy", "seed"])
def test_a_missing_field_is_refused(tmp_path, missing):
    config = {"metric": "cosine", "strategy": "pruned", "seed": 0}
    del config[missing]
    artifact.write(tmp_path / "bank", "bank", {"rows": torch.eye(2)}, config)
    with pytest.raises(ArtifactError, match="save the bank again"):
        Bank.load(tmp_path / "bank")


def test_torn_and_foreign_files_are_refused(tmp_path):
    Bank(torch.randn(300, 8), strategy="pruned").save(tmp_path / "bank")
    whole = (tmp_path / "bank").read_bytes()
    for size in (0, 4, 40, len(whole) // 2, len(whole) - 1):
        (tmp_path / "torn").write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match="torn"):
            Bank.load(tmp_path / "torn")
    artifact.write(tmp_path / "model", "model", {"rows": torch.eye(2)}, {})
    with pytest.raises(ArtifactError, match="holds a model, not a bank"):
        Bank.load(tmp_path / "model")
    with pytest.raises(InputError, match="no such file"):
        Bank.load(tmp_path / "none")


def test_halves_and_broken_queries():
    bank = Bank(torch.randn(400, 24).half(), strategy="lowp")
    queries = torch.randn(30, 24)
    queries[4, 2], queries[5, 0], queries[6] = math.nan, math.inf, 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        distance, index = knn_topk(queries.to(dtype), bank, 3)
        assert distance.isnan().all(1).nonzero().flatten().tolist() == [4, 5]
        assert index[4:7].tolist() == [[0, 1, 2]] * 3
        assert distance[6].tolist() == [1, 1, 1]
    assert knn_topk(queries[:0], bank)[0].shape == (0, 1)
    assert knn_topk(torch.randn(2, 24), bank, 100)[0].shape == (2, 100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Bank(torch.ones(3)), r"must be a floating-point matrix, got torch.float32 \(3,\)"),
        (lambda: Bank(torch.ones(3, 2).int()), "must be a floating-point matrix, got torch.int32"),
        (lambda: Bank(torch.ones(0, 2)), r"no rows or no channels, got \(0, 2\)"),
        (lambda: Bank(torch.ones(3, 0)), "no rows or no channels"),
        (lambda: Bank(torch.ones(3, 2), "l2"), "unknown metric 'l2'"),
        (lambda: Bank(torch.ones(3, 2), strategy="fast"), "unknown strategy 'fast'"),
        (lambda: Bank(torch.ones(3, 2), seed=0.5), "seed must be an integer of 64 bits, got 0.5"),
        (lambda: Bank(torch.tensor([[1.0, 2.0], [1.0, math.nan], [math.inf, 0]])), "row 1 holds NaN or inf"),
        (lambda: Bank(torch.full((9, 2), 1e300, dtype=torch.float64)), "row 0 holds NaN or inf"),
        (lambda: Bank(torch.ones(3, 2)).add(torch.ones(1, 3)), "D = 2 on cpu, the rows D = 3"),
        (lambda: Bank(torch.ones(3, 2)).remove(torch.tensor([3])), r"row 3 is outside \[0, 3\)"),
        (lambda: Bank(torch.ones(3, 2)).remove(torch.tensor([-1])), "row -1 is outside"),
        (lambda: Bank(torch.ones(3, 2)).remove(torch.tensor([0.5])), "wants row numbers"),
        (lambda: Bank(torch.ones(2, 2)).remove(torch.tensor([0, 1])), "no row would be left"),
        (lambda: Bank([[1.0]]), "must be a tensor or a float32 memory map"),
    ],
)
def test_bad_banks_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda bank: knn_topk(torch.ones(2, 3), bank), "D differs, queries 3 and bank 2"),
        (lambda bank: knn_topk(torch.ones(2), bank), "must be a matrix"),
        (lambda bank: knn_topk(torch.ones(2, 2), bank, 4), "k = 4 exceeds the bank's 3 rows"),
        (lambda bank: knn_topk(torch.ones(2, 2), bank, -1), "k must be at least 1, got -1"),
        (lambda bank: knn_topk(torch.ones(2, 2), bank, 1, "euclidean"), "was prepared for 'cosine'"),
        (lambda bank: knn_topk(torch.ones(2, 2).int(), bank), "must be floating point"),
    ],
)
def test_bad_searches_are_refused(call, message):
    for strategy in EXACT:
        with pytest.raises(RuntimeError, match=message):
            call(Bank(torch.eye(3)[:, :2] + 1, strategy=strategy))


@pytest.mark.parametrize("streamed", [1 << 24, 30 * 70, 1])
def test_a_memory_mapped_bank_is_streamed(tmp_path, monkeypatch, streamed):
    """Whatever the blocks: rows come in few kinds, so that many are equally near."""
    monkeypatch.setattr(mapped_rows, "STREAMED", streamed)
    rows = torch.randn(40, 30)[torch.randint(40, (5000 if streamed > 1 else 50,))]
    broken = len(rows) - 1
    np.save(tmp_path / "rows.npy", rows.numpy())
    for mode in ("r", "c"):
        bank = Bank(np.load(tmp_path / "rows.npy", mmap_mode=mode), "cosine")
        queries = torch.randn(20, 30)
        queries[3, 3] = math.nan
        got, want = knn_topk(queries, bank, 3), knn_topk(queries, rows, 3)
        got[0][3] = want[0][3] = 0
        assert torch.equal(knn_topk(queries, bank, 50)[1], knn_topk(queries, rows, 50)[1])
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        assert bank.strategy == "float32"
        for name, argument in (("add", rows), ("remove", torch.tensor([0])), ("save", "x")):
            with pytest.raises(InputError, match="memory-mapped"):
                getattr(bank, name)(argument)
    with pytest.raises(InputError, match="searched by 'float32', not 'lowp'"):
        Bank(np.load(tmp_path / "rows.npy", mmap_mode="r"), strategy="lowp")
    rows[broken, 7] = math.nan
    np.save(tmp_path / "rows.npy", rows.numpy())
    with pytest.raises(InputError, match=f"row {broken} holds NaN"):
        Bank(np.load(tmp_path / "rows.npy", mmap_mode="r"))


@pytest.fixture
def mapped(tmp_path, monkeypatch):
    """Rows in a file, searched 10 at a time."""
    monkeypatch.setattr(mapped_rows, "STREAMED", 10 * 1024)
    rows = torch.randn(64, 1024)
    np.save(tmp_path / "rows.npy", rows.numpy())
    return rows, tmp_path / "rows.npy"


@pytest.mark.parametrize("view", [slice(None), slice(5, 60), slice(3, None, 4)])
def test_a_mapped_file_that_is_cut_is_named(mapped, view):
    rows, path = mapped
    bank = Bank(np.load(path, mmap_mode="r")[view])
    queries = torch.randn(2, 1024)
    assert torch.equal(knn_topk(queries, bank)[1], knn_topk(queries, rows[view])[1])
    last = range(64)[view][-1]
    needed = 128 + (last + 1) * 4096
    os.truncate(path, needed)
    assert torch.equal(knn_topk(queries, bank)[1], knn_topk(queries, rows[view])[1])
    os.truncate(path, 128 + 4096 * 20)
    with pytest.raises(InputError, match=rf"rows.npy: was cut to 82048 bytes .* needs {needed}; write the"):
        knn_topk(queries, bank)


def test_a_mapped_file_may_be_replaced_or_removed(mapped, tmp_path):
    rows, path = mapped
    bank, queries = Bank(np.load(path, mmap_mode="r")), torch.randn(2, 1024)
    want = knn_topk(queries, rows)[1]
    (tmp_path / "other").write_bytes(b"short")
    (tmp_path / "other").replace(path)
    assert torch.equal(knn_topk(queries, bank)[1], want)
    path.unlink()
    assert torch.equal(knn_topk(queries, bank)[1], want)


def test_what_a_mapped_bank_is_not_for(mapped):
    _, path = mapped
    with pytest.raises(InputError, match=r"rows in the order of the file, got strides \(-4096, 4\)"):
        Bank(np.load(path, mmap_mode="r")[::-1])
    bank = Bank(np.load(path, mmap_mode="r"))
    for call in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(InputError, match=r"not copied or pickled; open its file .* mmap_mode='r'"):
            call(bank)
    with pytest.raises(RuntimeError, match=r"queries must be floating point, got torch.int64"):
        knn_topk(torch.ones(2, 1024, dtype=torch.int64), bank)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_a_mapped_bank_takes_the_queries_of_others(mapped, dtype, metric):
    rows, path = mapped
    queries = torch.randn(5, 1024).to(dtype)
    got = knn_topk(queries, Bank(np.load(path, mmap_mode="r"), metric), 3, metric)
    want = knn_topk(queries, Bank(rows, metric), 3, metric)
    assert got[0].dtype == want[0].dtype
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("row", lambda x: x.fill_(700), r"packed row numbers 700 \.\. 700, M is 700"),
        ("row", lambda x: x.sub_(1), r"packed row numbers -2 \.\. 698"),
        ("row", lambda x: x.clamp_max_(-1), "a column for each of 700 rows, got 0"),
        ("row", lambda x: x[:-1], "whole panels of 32"),
        ("row", lambda x: x.int(), "packed row must be contiguous torch.int64"),
        ("codes", lambda x: x[:-1], r"packed codes must be contiguous torch.uint8 \("),
        ("scale", lambda x: x[:1].expand(len(x)), r"packed scale must be contiguous .* of strides \(0,\)"),
        ("scale", lambda x: x[:-1], "whole panels of 32"),
        ("scale", lambda x: x[:-32], "a packed bank of 700 rows has 704 columns, got 672"),
        ("scale", lambda x: torch.cat([x, x[:32]]), "of 700 rows has 704 columns, got 736"),
        ("error", lambda x: x.repeat_interleave(32), r"packed error must be contiguous .* \(22,\)"),
        ("center", lambda x: x[:20], "packed center must be"),
        ("starts", lambda x: x.flip(0), "packed starts must rise from 0"),
        ("starts", lambda x: x.clamp(min=32), "packed starts must rise from 0"),
        ("starts", lambda x: torch.cat([x[:-1], x[-1:] + 32]), "packed starts must rise from 0"),
        ("centroids", lambda x: x[:1], "packed centroids must be"),
        ("basis", lambda x: torch.ones(21, 22), "packed basis has 22 directions in 21 channels"),
        ("basis", lambda x: x[:, :4].contiguous(), "packed outline_codes must be"),
        ("outline_weight", lambda x: x[:1], "packed outline_weight must be"),
        ("outline_bias", lambda x: x.double(), "packed outline_bias must be"),
    ],
)
def test_hand_made_lists_are_refused(form, change, message):
    kind, names = ("lowp", CODED) if form in CODED else ("pruned", BOTH)
    packed = [x.clone() for x in forms(clustered(700, 21), "cosine")[kind]]
    if form == "basis":
        assert packed[names.index("basis")].shape == (21, 8)
    at = names.index(form)
    packed[at] = change(packed[at])
    with pytest.raises(RuntimeError, match=message):
        knn_bank(torch.randn(3, 21), packed, 1, "cosine", 0)


def test_lists_of_another_length_are_refused():
    packed = forms(clustered(700, 21), "cosine")["pruned"]
    for count in (2, 8, 11, 16):
        with pytest.raises(RuntimeError, match=f"1, 7, 12 or 17 tensors, got {count}"):
            knn_bank(torch.randn(3, 21), packed[:count], 1, "cosine", 0)


def test_the_bound_of_outlines_holds_and_is_not_idle():
    """Codes and tails of both levels, with the errors of both sides, are never below the true score."""
    rows = torch.nn.functional.normalize(clustered(900, 96))
    packed = SimpleNamespace(**forms_of(forms(rows, "cosine")["pruned"]))
    held, columns = packed.row >= 0, len(packed.row)
    assert packed.basis.shape == (96, 48)
    centered = (rows - packed.center).double()[packed.row[held]]
    truth = centered @ centered.T - centered.square().sum(1) / 2
    near, others = packed.outline_codes.split([32 * columns, 16 * columns])
    product, seen = 0, []
    for level, (codes, channels) in enumerate(((near, 32), (others, 16))):
        codes = codes.view(-1, channels // 4, 32, 4).permute(0, 2, 1, 3).reshape(-1, channels)
        approximate = (codes.double() - 128)[held] * packed.outline_scale[level, held, None].double()
        seen.append(packed.basis.double()[:, 32 * level : 32 * level + channels])
        directions = torch.cat(seen, dim=1)
        assert torch.allclose(approximate, centered @ seen[-1], atol=0.01)
        tail = packed.outline_tail[level, held].double()
        outside = (centered - centered @ directions @ directions.T).norm(dim=1)
        assert torch.allclose(tail, outside, atol=3e-3)
        assert bool((tail >= outside).all())
        bias = packed.outline_bias[level, held].double()
        error = bias + centered.square().sum(1) / 2  # rows are their own queries, with the same part of it
        product = product + approximate @ approximate.T
        upper = product + tail[:, None] * tail + bias + error[:, None]
        assert bool((upper >= truth).all())
        assert float((upper - truth).median()) < (0.3, 0.2)[level]


def test_scaling_twice_is_scaling_once(isa):
    rows = torch.randn(2000, 77) * 10.0 ** torch.linspace(-18, 18, 2000)[:, None]
    rows[7] = 0
    once = providers.unit_rows(rows)
    assert torch.equal(providers.unit_rows(once), once)
    assert not torch.equal(providers.unit_rows(1.001 * once), 1.001 * once)


def test_adopted_rows_are_not_copied_and_give_the_same_bits():
    rows, queries = clustered(5000, 40), clustered(50, 40)
    unit = providers.unit_rows(rows)
    for metric, own in (("cosine", unit), ("euclidean", rows)):
        bank = Bank(own, metric, adopt=True)
        assert bank.rows.data_ptr() == own.data_ptr()
        for got, want in zip(
            knn_topk(queries, bank, 3, metric), knn_topk(queries, rows, 3, metric), strict=True
        ):
            assert torch.equal(got, want)
    with pytest.raises(InputError, match=r"norm of row \d+ is .* off 1, more than 4.5e-07; divide rows by"):
        Bank(rows, adopt=True)
    with pytest.raises(InputError, match="must be contiguous float32"):
        Bank(unit.T, adopt=True)
    with pytest.raises(InputError, match="must be contiguous float32"):
        Bank(unit.double(), adopt=True)
