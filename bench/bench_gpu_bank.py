"""A GPU searches the full BraTS bank: as bfloat16 rows, and as int8 codes beside float32 rows on the host."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench import gpu
from bench.conftest import TICKS
from dinofast.ops import Bank

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

QUERIES, ROWS, D = 1024, 7_680_000, 384
CHUNK = 1 << 17
CHECKED = 16
"""Queries whose distances are also found in float64."""


def rows(clusters: int, count: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Draw unit rows (count, D), random or around some centers; only chunks are wider than dtype."""
    generator = torch.Generator("cuda").manual_seed(seed)
    centers = torch.randn(
        max(clusters, 1), D, device="cuda", generator=torch.Generator("cuda").manual_seed(0)
    )
    found = torch.empty(count, D, dtype=dtype, device=device, pin_memory=device == "cpu")
    for start in range(0, count, CHUNK):
        block = found[start : start + CHUNK]
        x = torch.randn(len(block), D, device="cuda", generator=generator)
        if clusters:
            near = torch.randint(clusters, (len(block),), device="cuda", generator=generator)
            x = centers[near] + 0.5 * x
        block.copy_(torch.nn.functional.normalize(x))
    return found


def least(queries: Tensor, bank: Tensor) -> Tensor:
    """Find the least cosine distance of each query in float64."""
    unit = torch.nn.functional.normalize(queries.double())
    best = torch.full((len(queries),), 2.0, device="cuda", dtype=torch.float64)
    for start in range(0, len(bank), CHUNK):
        block = torch.nn.functional.normalize(bank[start : start + CHUNK].cuda().double())
        best = torch.minimum(best, (1 - unit @ block.T).amin(1))
    return best


@pytest.mark.parametrize("clusters", [0, 400], ids=["random", "clustered"])
@pytest.mark.parametrize("kept", ["bfloat16", "codes_and_host"])
def bench_gpu_bank(benchmark: BenchmarkFixture, kept: str, clusters: int) -> None:
    half = kept == "bfloat16"
    bank_rows = rows(clusters, ROWS, torch.bfloat16 if half else torch.float32, "cuda" if half else "cpu", 1)
    queries = rows(clusters, QUERIES, torch.float32, "cuda", 2)
    bank = Bank(bank_rows, strategy="lowp", adopt=half, device="cuda")
    del bank_rows
    distance, _ = bank.search(queries, 1)
    error = float((distance[:CHECKED, 0] - least(queries[:CHECKED], bank.rows)).abs().max())
    assert error < 1e-6, f"off by {error}"
    torch.cuda.reset_peak_memory_stats()
    times = gpu.measure(lambda: bank.search(queries, 1))
    mean, most = bank.candidates
    facts = {
        "contender": "dinofast-triton",
        "device": torch.cuda.get_device_name(),
        "bytes": bank.nbytes_by_device,
        "peak_bytes": torch.cuda.max_memory_allocated() - gpu.COLD_BYTES,
        "candidates_mean": mean,
        "candidates_most": most,
        "largest_error": error,
        "graph_seconds": times.graph,
        "not_captured": times.why,
        "tflops": 2 * QUERIES * ROWS * D / times.eager / 1e12,
        "share_of_gpu_ceiling": gpu.ceiling().share(2 * QUERIES * ROWS * D, bank.nbytes, times.eager),
    }
    print(f"bank {kept} {clusters}: {1e3 * times.eager:.2f} ms, {facts}", flush=True)
    benchmark.group = f"bank {kept} {'clustered' if clusters else 'random'}"
    benchmark.extra_info.update(facts)
    TICKS.extend(tick for sample in times.samples for tick in (0.0, sample))
    benchmark.pedantic(lambda: None, rounds=len(times.samples))
