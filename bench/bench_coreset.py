"""The greedy coreset against the plain loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.measure import OURS, Group, Measure
from bench.shapes import clustered_rows, unit_rows
from dinofast.models.coreset import k_center

CONTENDERS = (OURS, "torch")
SIZES: dict[str, tuple[Callable[[], Tensor], int]] = {
    "random_500_of_10000": (lambda: unit_rows(10_000, 0), 500),
    "clustered_500_of_10000": (lambda: clustered_rows(10_000, 64, 0), 500),
    "random_2000_of_20000": (lambda: unit_rows(20_000, 0), 2000),
    "clustered_2000_of_20000": (lambda: clustered_rows(20_000, 64, 0), 2000),
}
"""Name -> what makes the rows, how many are selected; those of 20 000 rows need --slow."""

TOLERANCE = 1e-6
"""By how much a selected row may miss the farthest, in squared distance: float32 decides."""

CASES = [
    pytest.param(size, name, marks=[pytest.mark.slow] if size.endswith("20000") else [])
    for size in SIZES
    for name in CONTENDERS
]


@pytest.mark.parametrize(("size", "contender"), CASES)
def bench_coreset(measure: Measure, size: str, contender: str) -> None:
    measure(f"k_center {size}", contender, lambda: _prepare(size))


def _prepare(size: str) -> Group:
    make, k = SIZES[size]
    rows = make()
    ours = partial(k_center, rows, k)
    selected = {OURS: ours()}
    calls = {OURS: ours, "torch": partial(_plain_loop, rows, k, int(selected[OURS][0]))}
    selected["torch"] = calls["torch"]()
    errors = {OURS: _shortfall(rows, selected[OURS])}
    same = torch.equal(*selected.values())
    errors["torch"] = errors[OURS] if same else _shortfall(rows, selected["torch"])
    for name, error in errors.items():
        assert error <= TOLERANCE, f"{name} selects a row that is nearer than the farthest by {error:.3g}"
    facts = {
        name: {
            "backend": name,
            "device": "cpu",
            "dtype": "float32",
            "sizes": [list(rows.shape), [k]],
            "largest_error": error,
            "same_selection": same,
        }
        for name, error in errors.items()
    }
    return Group(calls, facts)


def _plain_loop(rows: Tensor, k: int, first: int) -> Tensor:
    """Select greedily, with one matrix-vector product a step."""
    norms = rows.square().sum(1)
    gap, selected, farthest = torch.full_like(norms, torch.inf), torch.empty(k, dtype=torch.int64), first
    for step in range(k):
        selected[step] = farthest
        distance = torch.mv(rows, rows[farthest]).mul_(-2).add_(norms).add_(norms[farthest])
        torch.minimum(gap, distance, out=gap)
        farthest = int(gap.argmax())
    return selected


def _shortfall(rows: Tensor, selected: Tensor) -> float:
    """Follow a selection in float64: by how much its worst step misses the farthest row, squared."""
    assert selected.unique().numel() == selected.numel(), "a row is selected twice"
    exact = rows.double()
    norms = exact.square().sum(1)
    gap, worst = torch.full_like(norms, torch.inf), 0.0
    for step, index in enumerate(selected.tolist()):
        if step:
            worst = max(worst, float(gap.max() - gap[index]))
        torch.minimum(gap, norms + norms[index] - 2 * (exact @ exact[index]), out=gap)
    return worst
