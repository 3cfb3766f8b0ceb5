"""Coresets: few rows that leave no row far from its nearest one, chosen greedily."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dinofast.errors import InputError
from dinofast.ops import farthest_point
from dinofast.ops.providers import native_k_center
from dinofast.ops.rows import BLOCK, row_blocks

STARTS = ("random-row", "mean-of-10", "distance-norm")
PROJECTIONS = ("linear-128", "sparse-jl")
_JL_ERROR = 0.9


def k_center(
    rows: Tensor,
    n_select: int | None = None,
    *,
    ratio: float | None = None,
    start: str = "random-row",
    projection: str | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Tensor:
    """Select rows greedily: each time the row farthest from the nearest row selected so far.

    The first of equally far rows is taken and no row twice, so K = N gives a permutation, duplicates last.
    On the CPU most distances are never computed, and the selection is still that of the plain algorithm, for
    any number of threads. Elsewhere every step is one `farthest_point`, and none waits for the device.

    Args:
        rows: (N, D), N >= 1, all finite, floating point, on any device. Compared in float32.
        n_select: K, rows to select, in [1, N]; this or `ratio`.
        ratio: K = ⌊ratio · N⌋, in (0, 1].
        start: "random-row", the first row selected is drawn at random; "mean-of-10", rows begin with their
            mean distance to ten random rows (all when N < 10), which are not selected; "distance-norm", the
            first row selected has the largest root of the summed squared distances to all rows.
        projection: what distances are measured in: None, the rows; "linear-128", a random linear map to 128
            channels, entries uniform in ±1/√D, unless D is 128; "sparse-jl", a sparse random map to
            ⌊4 ln N / (e²/2 − e³/3)⌋ channels, e = 0.9, unless that is D or more.
        seed: of the start and the projection.
        progress: called as progress("coreset", rows selected, K), about a hundred times, first with 0.

    Returns:
        (K,) int64 on the device of `rows`, in the order of selection.

    Raises:
        InputError: an argument out of range, both or neither of `n_select` and `ratio`, a ratio that selects
            no row, or a row with NaN or inf, naming the first.

    References:
        Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985.
        Roth et al., "Towards total recall in industrial anomaly detection", CVPR 2022, arXiv 2106.08265.

    >>> k_center(torch.tensor([[0.0], [1.0], [5.0], [9.0]]), 4, seed=1).tolist()
    [1, 3, 2, 0]
    """
    k = _checked_count(rows, n_select, ratio)
    for name, value, known in (("start", start, STARTS), ("projection", projection, (None, *PROJECTIONS))):
        if value not in known:
            raise InputError(f"k_center: unknown {name} {value!r}; one of {', '.join(map(str, known))}")
    rows = rows.detach().to(torch.float32)
    _refuse_broken(rows)
    generator = torch.Generator().manual_seed(seed)
    rows = _project(rows, projection, generator)
    mean = start == "mean-of-10"
    starts = torch.randperm(rows.shape[0], generator=generator)[: 10 if mean else 1]
    if start == "distance-norm":
        starts = _farthest_from_all(rows)
    index = torch.empty(k, dtype=torch.int64, device=rows.device)
    done = 0
    if not mean:
        index[:1] = starts
        done = 1
    report = progress or (lambda _stage, _done, _total: None)
    report("coreset", 0, k)
    select = native_k_center(rows, starts.tolist(), mean, k - done) or _one_by_one(rows, starts, mean)
    for part in row_blocks(index[done:], math.ceil(k / 100)):
        select(part)
        done += part.shape[0]
        report("coreset", done, k)
    return index


def _farthest_from_all(rows: Tensor) -> Tensor:
    """Give the number of the row with the largest Σ|x − y|² over all y = N|x|² − 2x·Σy + Σ|y|²: (1,)."""
    step = BLOCK // rows.shape[1]
    total = sum(block.double().sum(dim=0) for block in row_blocks(rows, step))
    sums = [
        rows.shape[0] * block.double().square().sum(dim=1) - 2 * (block.double() @ total)
        for block in row_blocks(rows, step)
    ]
    return torch.cat(sums).argmax()[None]


def _one_by_one(rows: Tensor, starts: Tensor, mean: bool) -> Callable[[Tensor], None]:
    """Give the plain algorithm: a function that fills a vector with the next rows selected."""
    starts = starts.to(rows.device)
    everywhere = torch.full((rows.shape[0],), torch.inf, device=rows.device)
    total = sum(farthest_point(rows, everywhere, s)[0].double() for s in starts)
    assert isinstance(total, Tensor)
    gap = (total / starts.shape[0]).float()
    if not mean:
        gap[starts] = -1  # no distance: a row selected is never the farthest again
    farthest = gap.argmax()

    def select(index: Tensor) -> None:
        nonlocal gap, farthest
        for i in range(index.shape[0]):
            index[i] = farthest
            gap.index_fill_(0, farthest, -1)
            gap, farthest = farthest_point(rows, gap, farthest)

    return select


def _checked_count(rows: Tensor, n_select: int | None, ratio: float | None) -> int:
    if rows.dim() != 2 or 0 in rows.shape or not rows.is_floating_point():
        raise InputError(
            f"k_center: rows must be a floating-point matrix (N, D) with N, D >= 1, "
            f"got {rows.dtype} {tuple(rows.shape)}"
        )
    n = rows.shape[0]
    if (n_select is None) == (ratio is None):
        raise InputError(f"k_center: give n_select or ratio, got n_select={n_select} and ratio={ratio}")
    if ratio is not None:
        if not 0 < ratio <= 1:
            raise InputError(f"k_center: ratio must be in (0, 1], got {ratio}")
        if int(ratio * n) == 0:
            raise InputError(
                f"k_center: ratio {ratio} of {n} rows selects none; give at least {1 / n:.2g}, or n_select"
            )
        return int(ratio * n)
    assert n_select is not None
    if not 1 <= n_select <= n:
        raise InputError(f"k_center: n_select must be in [1, {n}], the number of rows, got {n_select}")
    return n_select


def _refuse_broken(rows: Tensor) -> None:
    first = 0
    for block in row_blocks(rows, BLOCK // rows.shape[1]):
        broken = ~block.isfinite().all(dim=1)
        if bool(broken.any()):
            raise InputError(
                f"k_center: row {first + int(broken.nonzero()[0])} holds NaN or inf (as float32); "
                "leave such rows out"
            )
        first += block.shape[0]


def _project(rows: Tensor, projection: str | None, generator: torch.Generator) -> Tensor:
    n, d = rows.shape
    if projection == "linear-128" and d != 128:
        matrix = (2 * torch.rand(d, 128, generator=generator) - 1) / math.sqrt(d)
    elif projection == "sparse-jl" and (target := _jl_channels(n)) < d:
        density = 1 / math.sqrt(d)
        kept = torch.rand(d, target, generator=generator) < density
        sign = 2.0 * torch.randint(0, 2, (d, target), generator=generator) - 1
        matrix = kept * sign / math.sqrt(density * target)
    else:
        return rows
    return rows @ matrix.to(rows.device)


def _jl_channels(n: int) -> int:
    """Channels that keep the distances of n points within the error, by Johnson and Lindenstrauss."""
    return max(1, int(4 * math.log(n) / (_JL_ERROR**2 / 2 - _JL_ERROR**3 / 3)))
