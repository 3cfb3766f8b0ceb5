"""Every kernel for a GPU at its sizes, past a gate; then plain torch, the compiled reference and ratios."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import gpu, gpu_path
from bench.conftest import TICKS
from bench.measure import OURS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

CASES = [
    pytest.param(op, size, dtype, contender, id=f"{op}-{size}-{dtype}-{contender}")
    for (op, size), dtypes in gpu.SIZES.items()
    for dtype in dtypes
    for contender in (*gpu.kernels(op), "torch", "compiled reference")
]


TIMED: dict[tuple[str, str, str], dict[str, gpu.Times]] = {}
"""Operator, size and dtype -> contender -> what it took; a peer that fails takes no kernel with it."""


def timed(op: str, size: str, dtype: str, contender: str) -> gpu.Times:
    args = gpu.arguments(op, size, dtype)
    if not contender.startswith(OURS):
        return gpu.measure(gpu.peers(op, args)[contender])
    kernel = gpu.kernels(op)[contender]
    gpu.gate(op, args, kernel.run(*args))
    return gpu.measure(lambda: kernel.run(*args))


@pytest.mark.parametrize(("op", "size", "dtype", "contender"), CASES)
def bench_gpu_kernel(benchmark: BenchmarkFixture, op: str, size: str, dtype: str, contender: str) -> None:
    times = timed(op, size, dtype, contender)
    known = TIMED.setdefault((op, size, dtype), {})
    known[contender] = times
    cost = gpu.OPS[op].cost(*gpu.arguments(op, size, dtype))
    share = gpu.ceiling().share(cost.flops, cost.bytes, times.eager)
    facts = {
        "contender": contender,
        "device": torch.cuda.get_device_name(),
        "dtype": dtype,
        "graph_seconds": times.graph,
        "not_captured": times.why,
        "tflops": cost.flops / times.eager / 1e12,
        "tbytes": cost.bytes / times.eager / 1e12,
        "share_of_gpu_ceiling": share,
        "peak_extra_bytes": times.peak_extra,
    }
    line = f"{op} {size} {dtype} {contender}: {1e6 * times.eager:.1f} µs"
    line += f", {1e6 * times.graph:.1f} captured" if times.graph else f", not captured ({times.why})"
    line += f", {facts['tflops']:.1f} TFLOP/s, {facts['tbytes']:.2f} TB/s, {share:.0%} of the ceiling"
    line += f", {times.peak_extra / 2**20:.1f} MiB extra"
    for ours in [] if contender.startswith(OURS) else [name for name in known if name.startswith(OURS)]:
        facts[f"ratio_of_{ours}"] = ratio = known[ours].eager / times.eager
        line += f"; {ours} {1 / ratio:.2f}× as fast"
        if times.graph and (mine := known[ours].graph):
            facts[f"graph_ratio_of_{ours}"] = mine / times.graph
            line += f", {times.graph / mine:.2f}× captured"
    print(line, flush=True)
    benchmark.group = f"{op} {size} {dtype}"
    benchmark.extra_info.update(facts)
    TICKS.extend(tick for sample in times.samples for tick in (0.0, sample))
    benchmark.pedantic(lambda: None, rounds=len(times.samples))


@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", gpu_path.PATHS)
def bench_gpu_path(benchmark: BenchmarkFixture, name: str, dtype: str, compile: bool) -> None:
    times, difference = gpu_path.measure(name, dtype, compile)
    assert times.graph is not None
    facts = {
        "contender": OURS,
        "device": torch.cuda.get_device_name(),
        "dtype": dtype,
        "compiled_backbone": compile,
        "graph_seconds": times.graph,
        "largest_difference": difference,
        "peak_extra_bytes": times.peak_extra,
    }
    how = "compiled backbone" if compile else "plain backbone"
    print(
        f"Path {name}_448 {dtype} {how}: {1e6 * times.eager:.0f} µs eager, {1e6 * times.graph:.0f} replayed, "
        f"{times.eager / times.graph:.1f}×",
        flush=True,
    )
    benchmark.group = f"Path {name}_448 {dtype} {how}"
    benchmark.extra_info.update(facts)
    TICKS.extend(tick for sample in times.samples for tick in (0.0, sample))
    benchmark.pedantic(lambda: None, rounds=len(times.samples))
