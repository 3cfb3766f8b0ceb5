"""farthest_point: one step of greedy k-center selection, distance, running minimum and argmax in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from dinofast.ops.registry import Cost, Sample, define
from dinofast.ops.rows import BLOCK, check_rows, require, result_dtype, row_blocks, row_samples


def farthest_point(rows: Tensor, min_distance: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Add a center: shrink every row's distance to its nearest center, then find the farthest row.

    Repeating the step selects a greedy k-center coreset; no step waits for the device.

    Args:
        rows: (N, D), N >= 1, float32, bfloat16, float16 or float64.
        min_distance: (N,), Euclidean distance of every row to its nearest center so far, inf before the
            first; float32 (float64 for float64 rows).
        index: (), int64 on the device of `rows`: the row that becomes a center.

    Returns:
        min_distance: (N,), a new tensor: the smaller of the old value and the distance to the new center,
            exactly 0 for the center itself. A row with NaN gets NaN, and NaN stays NaN. Differences have the
            dtype of the result and their squares are summed in float64, so that every kernel finds the same
            centers.
        index: (), int64: the row with the largest value; the smallest index among equals, NaN before all.

    Raises:
        RuntimeError: wrong dimensions, dtype or device, no rows.

    >>> rows = torch.tensor([[0.0], [1.0], [5.0]])
    >>> farthest_point(rows, torch.full((3,), torch.inf), torch.tensor(0))
    (tensor([0., 1., 5.]), tensor(2))
    """
    distance, farthest = torch.ops.dinofast.farthest_point.default(rows, min_distance, index)
    return distance, farthest


def _reference(rows: Tensor, min_distance: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    _fake(rows, min_distance, index)
    dtype = result_dtype(rows)
    center = rows.index_select(0, index.view(1)).to(dtype)
    blocks = row_blocks(rows, BLOCK // rows.shape[1])
    distance = torch.cat([_norm(block.to(dtype) - center) for block in blocks])
    nearest = torch.minimum(min_distance, distance)
    top = nearest.max()
    is_top = torch.where(top.isnan(), nearest.isnan(), nearest == top)
    return nearest, is_top.to(torch.uint8).argmax()


def _norm(gaps: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gaps, dim=1, dtype=torch.float64)
    return norm.to(gaps.dtype)


def _fake(rows: Tensor, min_distance: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    check_rows("farthest_point", rows=rows)
    require(
        min_distance.shape == rows.shape[:1],
        lambda: f"farthest_point: min_distance is {tuple(min_distance.shape)}, rows {tuple(rows.shape)}",
    )
    require(
        min_distance.dtype == result_dtype(rows),
        lambda: f"farthest_point: min_distance must be {result_dtype(rows)}, got {min_distance.dtype}",
    )
    require(
        index.dim() == 0 and index.dtype == torch.int64,
        lambda: f"farthest_point: index must be an int64 scalar, got {index.dtype} {tuple(index.shape)}",
    )
    require(
        min_distance.device == rows.device and index.device == rows.device,
        lambda: (
            f"farthest_point: device differs, rows {rows.device}, min_distance {min_distance.device}, "
            f"index {index.device}"
        ),
    )
    return torch.empty_like(min_distance), torch.empty_like(index)


def _verify(args: tuple[Tensor, ...], results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    """Hold the index to its meaning: the first row that holds the largest of the distances returned."""
    nearest, farthest = results
    top = nearest.max()
    expected = nearest.isnan() if bool(top.isnan()) else nearest == top
    assert int(farthest) == int(expected.nonzero()[0]), f"row {int(farthest)} is not the first farthest"
    row, old = args[0][args[2]], args[1][args[2]]
    whole = bool(row.isfinite().all()) and not bool(old.isnan())
    assert not whole or float(nearest[args[2]]) == 0, "a center is not at 0 of itself"


def _cost(rows: Tensor, min_distance: Tensor, index: Tensor) -> Cost:
    n, d = rows.shape
    return Cost(bytes=n * d * rows.element_size() + 2 * n * min_distance.element_size(), flops=3 * n * d)


def _samples() -> list[Sample]:
    found = []
    for sample in row_samples():
        rows = sample.args[1]
        start = torch.full(rows.shape[:1], torch.inf)
        found.append(Sample(f"first center, {sample.name}", (rows, start, torch.tensor(rows.shape[0] - 1))))
    rows = found[6].args[0]
    near = torch.linalg.vector_norm(rows - rows[3], dim=1)
    found.append(Sample("second center", (rows, near, torch.tensor(0))))
    broken = rows.clone()
    broken[2, 0] = torch.nan
    found.append(Sample("NaN row", (broken, near, torch.tensor(0))))
    found.append(
        Sample(
            "several NaN rows, one of them old",
            (broken, near.where(near != near[9], torch.nan), torch.tensor(0)),
        )
    )
    found.append(Sample("huge rows", (rows * 1e30, torch.full_like(near, torch.inf), torch.tensor(5))))
    found.append(Sample("all equal", (torch.ones(33, 5), torch.full((33,), torch.inf), torch.tensor(7))))
    return found


OP = define(
    "farthest_point(Tensor rows, Tensor min_distance, Tensor index) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    samples=_samples,
    cost=_cost,
    inputs=(0,),
    verify=_verify,
    tolerance=lambda args, _: (1e-6, 4 * torch.finfo(torch.float32).eps),
)
