"""What every example prints: the host's result, dinofast's, the largest difference, both times."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def need(how: str, *packages: str) -> None:
    """Leave, saying how to install what is missing."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        sys.exit(f"needs {', '.join(missing)}: {how}")


def compare(title: str, host: Callable[[], Sequence[Any]], ours: Callable[[], Sequence[Any]]) -> None:
    """Run both twice, in turns, and print what they gave; times are of the faster run.

    Args:
        title: what is computed.
        host: gives arrays.
        ours: gives arrays of the same shapes.
    """
    seconds: dict[str, float] = {}
    results: dict[str, list[np.ndarray]] = {}
    for name, run in 2 * (("host", host), ("dinofast", ours)):
        start = time.perf_counter()
        found = run()
        seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
        results[name] = [np.asarray(array, dtype=np.float64) for array in found]
    print(title)
    for name, arrays in results.items():
        shown = "; ".join(f"{array.shape} {array.ravel()[:3].round(5).tolist()} ..." for array in arrays[:3])
        print(f"  {name:<9} {1e3 * seconds[name]:9.2f} ms   {shown}")
    pairs = list(zip(results["host"], results["dinofast"], strict=True))
    differences = [np.abs(a - b).max() if a.shape == b.shape else np.inf for a, b in pairs]
    print(f"  largest difference {max(differences):.3g}")
