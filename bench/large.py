"""A search in a bank larger than memory should hold, from a file, in a process of its own.

`python -m bench.large FILE ROWS QUERIES` prints JSON; `write` makes such a file.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.shapes import D, unit_rows
from dinofast.files import replacing
from dinofast.ops import Bank, knn_topk

BLOCK = 50_000
PLANTED = 64
"""Queries whose nearest row is known: a row of the bank itself, spread over it."""


def write(path: Path, rows: int) -> None:
    """Write (rows, 384) float32 rows of norm 1 as .npy, block by block, all different."""
    base = unit_rows(BLOCK, 0).numpy()
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, D)}
    with replacing(path) as temporary, Path(temporary).open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, rows, BLOCK):
            random = np.random.default_rng(start)
            turned = base[:, random.permutation(D)] * random.choice(np.float32([-1, 1]), D)
            np.ascontiguousarray(turned[: rows - start]).tofile(file)


def measure(path: Path, rows: int, queries: int) -> dict[str, Any]:
    """Search in a fresh process: seconds, peak memory in bytes (all, and without pages of files)."""
    command = [sys.executable, "-m", "bench.large", str(path), str(rows), str(queries)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _memory() -> dict[str, int]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssAnon")}


def _main(path: str, rows: int, queries: int) -> dict[str, Any]:
    mapped = np.load(path, mmap_mode="r")[:rows]
    where = torch.linspace(0, rows - 1, PLANTED).long()
    asked = torch.cat([torch.from_numpy(mapped[where.numpy()]), unit_rows(queries - PLANTED, 7)])
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _memory(), time.perf_counter()
    bank = Bank(mapped)
    opened = time.perf_counter()
    distance, index = knn_topk(asked, bank)
    searched, after = time.perf_counter(), _memory()
    assert torch.equal(index[:PLANTED, 0], where), "a row of the bank is not its own nearest"
    assert float(distance[:PLANTED].max()) < 1e-6
    return {
        "rows": rows,
        "channels": D,
        "queries": queries,
        "bytes_of_rows": 4 * rows * D,
        "threads": torch.get_num_threads(),
        "check_seconds": opened - start,
        "search_seconds": searched - opened,
        "gops": 2 * rows * queries * D / (searched - opened) / 1e9,
        "resident_before": before["VmRSS"],
        "peak_resident": after["VmHWM"],
        "peak_extra": after["VmHWM"] - before["VmRSS"],
        "anonymous_after": after["RssAnon"],
    }


if __name__ == "__main__":
    print(json.dumps(_main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
