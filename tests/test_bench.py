import math
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="bench/ is not beside the tests")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import bench.measure
    import bench.peers
    import bench.shapes

    return bench


def cosine_args():
    return torch.nn.functional.normalize(torch.randn(20, 8)), torch.nn.functional.normalize(torch.randn(7, 8))


def gate_of(bench, op, args):
    from dinofast.ops import OPS

    return bench.measure.Gate(OPS[op], args)


def test_gate_passes_the_kernel_and_the_peers(bench):
    args = cosine_args()
    gate = gate_of(bench, "cosine_max", args)
    for contender in bench.peers.contenders("cosine_max"):
        results = contender.read(contender.prepare(*args)())
        judge = gate.kernel if contender.name == bench.measure.OURS else gate.peer
        assert judge(results) < 1e-6


def test_gate_refuses_a_wrong_kernel(bench):
    args = cosine_args()
    similarity, index = torch.ops.dinofast.cosine_max.default(*args)
    gate = gate_of(bench, "cosine_max", args)
    with pytest.raises(AssertionError, match="errs by"):
        gate.kernel((similarity + 1e-4, index))
    with pytest.raises(AssertionError, match="misses the best"):
        gate.kernel((similarity, (index + 1) % 7))
    with pytest.raises(AssertionError, match="relative"):
        gate.peer((similarity + 1e-3,))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_gate_refuses_a_peer_without_numbers(bench, wrong):
    args = cosine_args()
    with pytest.raises(AssertionError):
        gate_of(bench, "cosine_max", args).peer((torch.full((20,), wrong),))


def test_gate_refuses_a_peer_of_another_shape(bench):
    args = cosine_args()
    with pytest.raises(AssertionError, match="shape"):
        gate_of(bench, "cosine_max", args).peer((torch.zeros(1),))


def test_rows_have_norm_one_and_every_size_makes_what_its_operator_takes(bench):
    rows = bench.shapes.unit_rows(300, seed=0)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(300))
    for op, sizes in bench.shapes.SHAPES.items():
        for name, make in sizes.items():
            slow = (op, name) in bench.shapes.SLOW
            if slow or name.startswith(("bank_1024x100000", "bank_real")):
                continue
            args = make()
            assert all(bool(x.isfinite().all()) for x in args if isinstance(x, torch.Tensor)), (op, name)
            assert bool((args[0].flatten(0, -2) != 0).any(dim=1).all()), (op, name)


def test_contenders_take_turns(bench, monkeypatch):
    monkeypatch.setattr(bench.measure, "SAMPLE_SECONDS", 0.002)
    monkeypatch.setattr(bench.measure, "PATIENCE_SECONDS", 0.0)
    order: list[str] = []

    def call(name, seconds):
        order.append(name)
        time.sleep(seconds)

    calls = {"a": lambda: call("a", 0.002), "b": lambda: call("b", 0.004)}
    timings = bench.measure.interleave(calls, {})
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert len(turns) >= bench.measure.ROUNDS[0]
    assert len(timings["a"].samples) == len(timings["b"].samples) >= bench.measure.ROUNDS[0]
    assert 0.002 <= timings["a"].median < timings["b"].median


def test_disturbed_samples_are_left_out_or_marked(bench):
    quiet, loud = bench.measure.Sample(1.0, 0.0), bench.measure.Sample(9.0, 0.5)
    timing = bench.measure.Timing([quiet, loud, quiet, loud, quiet])
    assert not timing.disturbed
    assert timing.median == 1.0
    timing = bench.measure.Timing([quiet, loud, loud, quiet, loud])
    assert timing.disturbed
    assert timing.median == 9.0


def test_unknown_load_counts_as_quiet(bench):
    assert bench.measure.Sample(1.0, math.nan).quiet


def test_an_artificial_slowdown_stretches_ours_alone(bench, monkeypatch):
    monkeypatch.setattr(bench.measure, "SAMPLE_SECONDS", 0.01)
    monkeypatch.setattr(bench.measure, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(bench.measure, "SLOWDOWN", 3.0)
    now = [0.0]
    monkeypatch.setattr(
        bench.measure.time, "perf_counter", lambda: now.__setitem__(0, now[0] + 1e-5) or now[0]
    )

    def call():
        now[0] += 0.01

    timings = bench.measure.interleave({"dinofast": call, "peer": call}, {})
    assert timings["dinofast"].median == pytest.approx(3 * timings["peer"].median, rel=0.02)


def test_extra_memory_of_a_bank_includes_its_prepared_forms(bench):
    from functools import partial

    import bench.memory
    from dinofast.ops import Bank, knn_topk

    rows, queries = torch.randn(500, 16), torch.randn(3, 16)
    for strategy in ("float32", "lowp", "pruned"):
        bank = Bank(rows, "cosine", strategy)
        extra = bench.memory.prepared_bytes(partial(knn_topk, queries, bank, 1, "cosine"))
        assert extra == sum(x.nbytes for x in bank.packed[1:])
        assert (extra >= 500 * 16) == (len(bank.packed) > 1)
    assert bench.memory.prepared_bytes(partial(knn_topk, queries, rows, 1, "cosine")) == 0
    assert bench.memory.prepared_bytes(lambda: None) == 0


def test_the_scikit_learn_step_runs_blas_in_one_thread(bench, monkeypatch):
    """Its own loop runs in threads, each of which multiplies matrices."""
    pytest.importorskip("sklearn")
    threadpoolctl = pytest.importorskip("threadpoolctl")
    from sklearn.cluster import _k_means_lloyd

    seen = []

    def blas():
        return [x["num_threads"] for x in threadpoolctl.threadpool_info() if x["user_api"] == "blas"]

    monkeypatch.setattr(_k_means_lloyd, "lloyd_iter_chunked_dense", lambda *_: seen.append(blas()))
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        outside = blas()
        bench.peers._sklearn_lloyd(torch.randn(50, 8), torch.randn(3, 8))()
        assert blas() == outside
    assert outside
    assert set(seen[0]) == {1}
