"""Times on a GPU: events around single calls, L2 made cold between them, eager and as a captured graph.

`python -m bench.gpu OPERATOR` only calls its kernels, for a profiler.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bench.measure import OURS, Call, Ceiling, Gate
from bench.peers import _torch_full, _torch_max, _torch_products, _torch_topk
from bench.shapes import SHAPES, unit_rows
from dinofast.ops import OPS
from dinofast.testing import as_tuple, cast_inputs

REPEATS = 50
COLD_BYTES = 1 << 28
"""Written between two calls: more than the L2 of any GPU."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

SIZES = {
    ("cosine_map", "image_32_to_448"): ("float32", "bfloat16"),
    ("cosine_max", "image_1024x150"): ("float32", "bfloat16"),
    ("cosine_max", "bank_1024x100000"): ("float32", "bfloat16"),
    ("knn_topk", "bank_1024x10000_k3"): ("float32", "bfloat16"),
    ("knn_topk", "bank_1024x100000_random"): ("float32", "bfloat16"),
    ("dpm_stats", "batch_12288x500_diag"): ("float32",),
    ("dpm_stats", "part_1024x64_full"): ("float32",),
    ("upsample_blur", "image_32_to_448"): ("float32",),
    ("farthest_point", "random_100000"): ("float32", "bfloat16"),
}


def _interpolated(features: Tensor, prototypes: Tensor, size: list[int], mask: None) -> Call:
    def call() -> Tensor:
        rows = torch.nn.functional.normalize(features.flatten(0, 2))
        distance = (1 - (rows @ prototypes.T).amax(dim=1)).view(features.shape[:3])
        return torch.nn.functional.interpolate(distance[:, None].float(), size=size, mode="bilinear")[:, 0]

    return call


def _farthest(rows: Tensor, min_distance: Tensor, index: Tensor) -> Call:
    def call() -> tuple[Tensor, Tensor]:
        gap = torch.linalg.vector_norm(rows - rows.index_select(0, index.view(1)), dim=1, dtype=torch.float32)
        nearest = torch.minimum(min_distance, gap)
        return nearest, nearest.argmax()

    return call


def _mixture(x: Tensor, *parameters: Any) -> Call:
    full = parameters[-1] == "full"
    return _torch_full(x, *parameters) if full else _torch_products(x, *parameters)


def _nearest(queries: Tensor, bank: Tensor, k: int, metric: str) -> Call:
    return _torch_max(queries, bank) if k == 1 else _torch_topk(queries, bank, k, metric)


ONE_LINERS: dict[str, Callable[..., Call]] = {
    "cosine_max": _torch_max,
    "cosine_map": _interpolated,
    "knn_topk": _nearest,
    "farthest_point": _farthest,
    "dpm_stats": _mixture,
}
"""Operator -> plain torch for the same work, on rows of norm 1; where there is none, its reference stands."""


@lru_cache(maxsize=1)
def arguments(op: str, size: str, dtype: str) -> tuple[Any, ...]:
    """Give the operator's arguments on the GPU."""
    if op == "farthest_point":
        made: tuple[Any, ...] = (unit_rows(100_000, 0), torch.full((100_000,), torch.inf), torch.tensor(0))
    else:
        made = SHAPES[op][size]()
    return cast_inputs(OPS[op], tree_map_only(Tensor, Tensor.cuda, made), DTYPES[dtype])


def kernels(op: str) -> dict[str, Any]:
    """Give our kernels for a GPU: name of the contender -> kernel."""
    offers = (k for k in OPS[op].kernels if "cuda" in k.devices and k.backend != "reference")
    return {f"{OURS}-{kernel.backend}": kernel for kernel in offers}


def peers(op: str, args: tuple[Any, ...]) -> dict[str, Call]:
    """Give what our kernels are compared with; neither of them passes a gate: they may err more."""
    plain = ONE_LINERS[op](*args) if op in ONE_LINERS else partial(OPS[op].reference, *args)
    torch.compiler.reset()  # else another size of the same code is compiled for any size
    compiled = torch.compile(OPS[op].reference, dynamic=False)
    return {"torch": plain, "compiled reference": partial(compiled, *args)}


@dataclass(frozen=True)
class Times:
    """Seconds of one call: medians, and every sample of the eager call.

    Attributes:
        eager: median.
        samples: all of them.
        graph: median of the captured call; None where it cannot be captured.
        why: the reason for that.
        peak_extra: most bytes that a call holds beside its arguments and results.
    """

    eager: float
    samples: list[float]
    graph: float | None
    why: str
    peak_extra: int


def measure(call: Call) -> Times:
    """Time a call with cold L2, then the same as a CUDA graph; both run twice before."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(), call()
    torch.cuda.synchronize()
    peak = _peak_extra(call)
    samples = _samples(call)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:  # a peer may wait for the device; that is told, not hidden
        torch.cuda.synchronize()
        return Times(statistics.median(samples), samples, None, str(error).splitlines()[0], peak)
    return Times(statistics.median(samples), samples, statistics.median(_samples(graph.replay)), "", peak)


def _peak_extra(call: Call) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = as_tuple(call())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(result.nbytes for result in results)


def _samples(call: Call) -> list[float]:
    cold = torch.empty(COLD_BYTES, dtype=torch.uint8, device="cuda")
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    call()
    for begin, end in marks:
        cold.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


@lru_cache(maxsize=1)
def ceiling() -> Ceiling:
    """Measure a bf16 product of 8192³ and a copy of 1 GiB, in this run."""
    side, size = 8192, 1 << 30
    a, b = torch.randn(2, side, side, device="cuda", dtype=torch.bfloat16).unbind()
    source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    product = min(_samples(lambda: a @ b))
    copy = min(_samples(lambda: target.copy_(source)))
    return Ceiling(2 * side**3 / product, 2 * size / copy)


def gate(op: str, args: tuple[Any, ...], results: Any) -> float:
    """Hold a kernel's results to the truth, as the tests do; give the largest error."""
    return Gate(OPS[op], args).kernel(results if isinstance(results, tuple) else (results,))


def main() -> None:
    """Call every kernel of an operator twice at its first size, in each dtype."""
    wanted = sys.argv[1]
    op, size = next(pair for pair in SIZES if pair[0] == wanted)
    for dtype in SIZES[op, size]:
        args = arguments(op, size, dtype)
        for kernel in kernels(op).values():
            for _ in range(2):
                kernel.run(*args)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
