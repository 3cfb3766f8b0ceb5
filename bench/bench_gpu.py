"""Every kernel for a GPU at its sizes, past a gate, against plain torch and the compiled reference."""

from __future__ import annotations

from functools import cache

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


@cache
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
    }
    line = f"{op} {size} {dtype} {contender}: {1e6 * times.eager:.1f} µs"
    line += f", {1e6 * times.graph:.1f} captured" if times.graph else f", not captured ({times.why})"
    line += f", {facts['tflops']:.1f} TFLOP/s, {facts['tbytes']:.2f} TB/s, {share:.0%} of the ceiling"
    if contender.startswith(OURS):
        for peer in ("torch", "compiled reference"):
            facts[f"ratio_to_{peer}"] = times.eager / timed(op, size, dtype, peer).eager
            line += f", {1 / facts[f'ratio_to_{peer}']:.2f}× {peer}"
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
