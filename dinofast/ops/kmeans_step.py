"""kmeans_step: one Lloyd iteration, the nearest center of every row and the sums that move the centers."""

from __future__ import annotations

import torch
from torch import Tensor

from dinofast.ops.registry import Cost, Sample, define
from dinofast.ops.rows import BLOCK, check_rows, require, result_dtype, row_blocks, row_samples


def kmeans_step(rows: Tensor, centers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assign every row to its nearest center and sum the rows of each center.

    The (N, K) matrix of distances is never written. The mean of a center's rows is sums / counts; what
    becomes of a center without rows is the caller's to say.

    Args:
        rows: (N, D), float32, bfloat16, float16 or float64.
        centers: (K, D), K >= 1, float32 (float64 for float64 rows), same device.

    Returns:
        index: (N,), int64, in [-1, K): the nearest center by squared Euclidean distance; the smallest index
            among equal ones. -1 for a row with NaN or inf, and for every row when a center has one.
        sq_distance: (N,), the sum of (x - c)² over the channels to that center, float32 (float64 for float64
            rows); inf where that type cannot hold it. NaN where index is -1.
        sums: (K, D), same dtype: the sum of the rows of each center, 0 without rows. Added up in float64 in
            the order of the rows, so that the number of threads changes nothing.
        counts: (K,), int64: rows of each center. Rows with index -1 are neither summed nor counted.

    Raises:
        RuntimeError: not matrices, D or device differ, D = 0, no centers, or centers of another dtype.

    References:
        Lloyd, Least squares quantization in PCM, IEEE Transactions on Information Theory 28, 1982.

    >>> rows = torch.tensor([[0.0], [1.0], [5.0]])
    >>> index, sq_distance, sums, counts = kmeans_step(rows, torch.tensor([[1.0], [4.0]]))
    >>> index.tolist(), sq_distance.tolist(), sums.tolist(), counts.tolist()
    ([0, 0, 1], [1.0, 0.0, 1.0], [[1.0], [5.0]], [2, 1])
    """
    index, sq_distance, sums, counts = torch.ops.dinofast.kmeans_step.default(rows, centers)
    return index, sq_distance, sums, counts


def _reference(rows: Tensor, centers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index, sq_distance, sums, counts = _fake(rows, centers)
    (k, d), wide = centers.shape, centers.double()
    total = wide.new_zeros(k + 1, d)  # the last one takes the broken rows
    whole_centers = centers.isfinite().all()
    start = 0
    for block in row_blocks(rows, BLOCK // max(k, d)):
        part, block = slice(start, start + len(block)), block.double()
        gap = torch.cdist(block, wide, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = gap.square_().to(sq_distance.dtype).min(dim=1)
        broken = ~(block.isfinite().all(dim=1) & whole_centers)
        index[part] = nearest.indices.masked_fill(broken, -1)
        sq_distance[part] = nearest.values.masked_fill(broken, torch.nan)
        owner = nearest.indices.masked_fill(broken, k)
        total.index_add_(0, owner, block.masked_fill(broken[:, None], 0))
        start += len(block)
    sums.copy_(total[:k])
    counts.copy_(torch.bincount(index + 1, minlength=k + 1)[1:])
    return index, sq_distance, sums, counts


def _fake(rows: Tensor, centers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_rows("kmeans_step", may_be_empty=True, rows=rows)
    check_rows("kmeans_step", centers=centers)
    (n, d), dtype = rows.shape, result_dtype(rows)
    require(centers.shape[1] == d, lambda: f"kmeans_step: D differs, rows {d} and centers {centers.shape[1]}")
    require(
        centers.dtype == dtype and centers.device == rows.device,
        lambda: (
            f"kmeans_step: centers must be {dtype} on {rows.device}, got {centers.dtype} on {centers.device}"
        ),
    )
    index = rows.new_empty(n, dtype=torch.int64)
    sums = centers.new_empty(centers.shape)
    return index, rows.new_empty(n, dtype=dtype), sums, index.new_empty(centers.shape[0])


def _verify(args: tuple[Tensor, ...], results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    """Hold the index to its meaning, and counts and sums to the index."""
    rows, centers = args[0].double(), args[1].double()
    index, _, sums, counts = results
    sq_distance = truth[1]
    assert torch.equal(index < 0, sq_distance.isnan()), "index -1 stands elsewhere than NaN"
    assert bool(((index >= -1) & (index < len(centers))).all()), "index outside [-1, K)"
    whole = index >= 0
    chosen, owner = rows[whole], index[whole]
    over = (chosen - centers[owner]).square().sum(1) - sq_distance[whole]
    slack = 1e-6 * sq_distance[whole] + 1e-12
    assert bool((over <= slack).all()), f"a named center misses the nearest by {over.max()}"
    _, group = torch.unique(centers, dim=0, return_inverse=True)
    first = torch.full_like(group, len(centers)).scatter_reduce_(
        0, group, torch.arange(len(centers), device=group.device), "amin"
    )
    assert torch.equal(first[group[owner]], owner), "not the first of equal centers"
    assert torch.equal(counts, torch.bincount(owner, minlength=len(centers))), "counts are not those of index"
    own = torch.zeros_like(centers).index_add_(0, owner, chosen)
    torch.testing.assert_close(sums.double(), own, rtol=1e-6, atol=1e-6)


def _samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    plain = row_samples((97, 150), (33, 64))
    found = [Sample(s.name, s.args) for s in plain if s.name != "tiny and huge rows"]
    rows, centers = draw(130, 33), draw(12, 33)
    scales = 10.0 ** torch.linspace(-30, 15, 130)[:, None]  # float32 holds the squares
    found.append(
        Sample("tiny and huge scales", (rows * scales, torch.cat([centers, rows[::9] * scales[::9]])))
    )
    found.append(Sample("far from the origin", (rows + 1000, centers + 1000)))
    found.append(Sample("duplicate rows", (rows[:7].repeat(9, 1), centers[:5])))
    found.append(Sample("rows that are centers", (centers[[4, 4, 0, 9, 11, 4]], centers)))
    found.append(Sample("all ties", (torch.zeros(50, 5), torch.eye(5))))
    found.append(Sample("center without rows", (rows, torch.cat([centers, centers.new_full((1, 33), 99.0)]))))
    broken = centers.clone()
    broken[3, 5] = torch.nan
    found.append(Sample("NaN center", (rows, broken)))
    return found


def _cost(rows: Tensor, centers: Tensor) -> Cost:
    (n, d), k = rows.shape, centers.shape[0]
    moved = n * d * rows.element_size() + n * 12 + k * (2 * d * 4 + 8)
    return Cost(bytes=moved, flops=2 * n * k * d + n * d)


OP = define(
    "kmeans_step(Tensor rows, Tensor centers) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    samples=_samples,
    cost=_cost,
    inputs=(0,),
    verify=_verify,
    tolerance=lambda args, _: (1e-6, 4 * torch.finfo(torch.float32).eps),
)
