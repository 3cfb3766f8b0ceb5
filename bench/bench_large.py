"""Exact search in banks that stream from a file: needs `--slow`, 16 GB of disk and some minutes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import large
from bench.conftest import TICKS

SIZES = {"10_million": 10_000_000, "brats": 7_680_000}
"""Name -> rows; the bank of the full BraTS set has 7 680 000."""


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(folder).free < 20e9:
        pytest.skip("needs 20 GB of disk")
    large.write(folder / "rows.npy", max(SIZES.values()))
    yield folder / "rows.npy"
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def bench_large_bank(benchmark: BenchmarkFixture, rows_file: Path, size: str) -> None:
    found = large.measure(rows_file, SIZES[size], 256)
    assert found["peak_extra"] < 1 << 30, f"holds {found['peak_extra']} bytes"
    TICKS.extend((0.0, found["search_seconds"]))
    benchmark.group = f"knn_topk from a file, 256x{SIZES[size]}x{large.D}"
    benchmark.extra_info.update(found)
    benchmark.pedantic(lambda: None, rounds=1)
