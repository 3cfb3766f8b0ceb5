"""knn_topk on the CPU: every instruction set, exact order among near ties, bad rows."""

import math

import pytest
import torch

from dinofast import ops
from dinofast.ops.knn_topk import METRICS
from dinofast.ops.registry import OPS
from dinofast.testing import assert_kernel, cast_inputs

native = pytest.importorskip("dinofast._native", reason="built without native kernels")
OP = OPS["knn_topk"]
KERNEL = next(kernel for kernel in OP.kernels if kernel.backend == "cpu")
ISAS = native.available_isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def brute(queries, bank, k, metric):
    """The k nearest by float64 distances, ties to the smallest index."""
    x, y = queries.double(), bank.double()
    if metric == "cosine":
        x, y = (z / z.norm(dim=1, keepdim=True).clamp_min(1e-300) for z in (x, y))
        distance = torch.stack([(1 - y @ row) for row in x])
    else:
        distance = torch.stack([(y - row).square().sum(1) for row in x])
    distance, index = distance.sort(dim=1, stable=True)
    return (distance.sqrt() if metric == "euclidean" else distance)[:, :k], index[:, :k]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_sample(isa, dtype):
    for sample in OP.samples():
        args = cast_inputs(OP, sample.args, dtype)
        if KERNEL.refuse(*args) is None:
            assert_kernel(OP, KERNEL, args)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 3, 15, 16, 17, 63, 65, 129])
def test_tails(isa, d, metric):
    for q, m, k in ((1, 1, 1), (3, 2, 2), (5, 15, 3), (7, 17, 1), (13, 33, 5), (25, 65, 64)):
        assert_kernel(OP, KERNEL, (torch.randn(q, d), torch.randn(m, d), k, metric))


def test_k_beyond_the_kernel_goes_to_the_reference():
    queries, bank = torch.randn(3, 5), torch.randn(90, 5)
    assert "k <= 64, got 65" in KERNEL.refuse(queries, bank, 65, "cosine")
    assert ops.knn_topk(queries, bank, 65)[0].shape == (3, 65)
    assert KERNEL.refuse(queries.double(), bank.double(), 1, "cosine") is not None


@pytest.mark.parametrize("metric", METRICS)
def test_the_same_bits_for_any_number_of_threads_and_any_instruction_set(
    monkeypatch, restored_threads, metric
):
    queries, bank = torch.randn(300, 100), torch.randn(5000, 100)
    found = []
    for isa in ISAS:
        monkeypatch.setenv("DINOFAST_ISA", isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(KERNEL.run(queries, bank, 7, metric))
    for distance, index in found[1:]:
        assert torch.equal(distance, found[0][0])
        assert torch.equal(index, found[0][1])


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
def test_a_common_offset_costs_no_accuracy(isa, metric):
    bank = torch.randn(3000, 64) + 1000
    queries = bank[:40] + 0.01 * torch.randn(40, 64)
    distance, index = KERNEL.run(queries, bank, 3, metric)
    truth, order = brute(queries, bank, 3, metric)
    assert torch.equal(index, order)
    torch.testing.assert_close(distance.double(), truth, rtol=1e-6, atol=0)


def test_near_duplicates_are_told_apart(isa):
    bank = torch.randn(1, 384).repeat(2000, 1)
    bank += 1e-5 * torch.randn(2000, 384)
    queries = bank[1200:1230].clone()
    for metric in METRICS:
        distance, index = KERNEL.run(queries, bank, 5, metric)
        assert index[:, 0].tolist() == list(range(1200, 1230))
        assert bool((distance[:, 0] == 0).all())
        torch.testing.assert_close(
            distance.double(), brute(queries, bank, 5, metric)[0], rtol=1e-2, atol=1e-12
        )


@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_smallest_index_however_many(isa, metric):
    bank = torch.randn(1, 33).repeat(1500, 1)
    bank[700] += 1
    _, index = KERNEL.run(bank[:30] + 0.5, bank, 64, metric)
    expected = [700, *range(63)] if index[0, 0] == 700 else list(range(64))
    assert index.tolist() == [expected] * 30
    _, index = KERNEL.run(torch.cat([bank[:1], bank[700:701]]), bank, 3, metric)
    assert index.tolist() == [[0, 1, 2], [700, 0, 1]]


@pytest.mark.parametrize("metric", METRICS)
def test_broken_rows(isa, metric):
    queries, bank = torch.randn(30, 40), torch.randn(9000, 40)
    queries[3, 39], queries[17, 0], queries[29, 5] = math.nan, math.inf, -math.inf
    distance, index = KERNEL.run(queries, bank, 4, metric)
    assert distance.isnan().all(1).nonzero().flatten().tolist() == [3, 17, 29]
    assert index[17].tolist() == [0, 1, 2, 3]
    assert int(distance.isnan().sum()) == 12
    for row in (0, 4000, 8999):
        for value in (math.nan, math.inf):
            bad = bank.clone()
            bad[row, 7] = value
            distance, index = KERNEL.run(queries, bad, 4, metric)
            assert bool(distance.isnan().all())
            assert index.tolist() == [[0, 1, 2, 3]] * 30


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("scale", [1e-30, 1e-42, 1e18, 3e37])
def test_extreme_norms(isa, metric, scale):
    queries, bank = torch.randn(5, 20) * scale, torch.randn(300, 20) * scale
    bank[7] /= 1e10
    distance, index = KERNEL.run(queries, bank, 3, metric)
    truth, _ = brute(queries, bank, 3, metric)
    torch.testing.assert_close(distance, truth.float(), rtol=1e-5, atol=1e-44)
    reached = (queries.double()[:, None] - bank.double()[index]).square().sum(2)
    torch.testing.assert_close(
        reached.sqrt() if metric == "euclidean" else reached, truth, rtol=1e-5, atol=1e-44
    ) if scale < 1e18 or metric == "euclidean" else None


def test_more_queries_than_one_chunk_and_more_rows_than_one_block(isa):
    queries, bank = torch.randn(4100, 2), torch.randn(300, 2)
    assert_kernel(OP, KERNEL, (queries, bank, 2, "euclidean"))
    assert_kernel(OP, KERNEL, (torch.randn(5, 4096), torch.randn(1100, 4096), 2, "cosine"))


def _duplicates(queries, bank):
    bank[300:] = bank[:300].clone()
    queries[:50] = bank[10:60]


def _opposite(queries, bank):
    queries[:] = -bank[:1]
    bank[:] = bank[:1].clone() * torch.rand(len(bank), 1)


KINDS = {
    "plain": lambda queries, bank: None,
    "duplicates": _duplicates,
    "opposite": _opposite,
    "zero query": lambda queries, bank: queries[3].zero_(),
    "zero row": lambda queries, bank: bank[7].zero_(),
    "broken query": lambda queries, bank: queries[5, :1].fill_(math.nan),
    "broken row": lambda queries, bank: bank[5, :1].fill_(math.inf),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_one_neighbor_is_the_first_of_two(isa, metric, kind):
    for dtype, d, scale in ((torch.float32, 40, 1.0), (torch.float32, 33, 1e-22), (torch.bfloat16, 65, 1.0)):
        queries, bank = torch.randn(260, d), torch.randn(600, d)
        KINDS[kind](queries, bank)
        queries, bank = (scale * queries).to(dtype), (scale * bank).to(dtype)
        one, two = (KERNEL.run(queries, bank, k, metric) for k in (1, 2))
        torch.testing.assert_close(one[0], two[0][:, :1], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(one[1], two[1][:, :1])


def test_one_neighbor_in_a_bank_of_several_blocks(isa):
    queries, bank = torch.randn(260, 2048), torch.randn(1100, 2048)
    bank[1050:] = bank[:50]
    queries[:50] = bank[:50]
    one, two = (KERNEL.run(queries, bank, k, "cosine") for k in (1, 2))
    assert torch.equal(one[0], two[0][:, :1])
    assert torch.equal(one[1], two[1][:, :1])
