"""K-means: rows to a few centers, by Lloyd's iterations from seeded starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dinofast.errors import InputError
from dinofast.ops import kmeans_step
from dinofast.ops.rows import normalize_rows

INITS = ("k-means++", "random-rows")
DISTANCES = ("euclidean", "cosine")


@dataclass(frozen=True)
class Clusters:
    """What `kmeans` found.

    Attributes:
        centers: (K, D), float32 (float64 for float64 rows).
        index: (N,), int64, the nearest center of every row.
        sq_distance: (N,), the squared Euclidean distance to it, same dtype as the centers.
        n_iter: iterations done, 0 where there was nothing to move.
    """

    centers: Tensor
    index: Tensor
    sq_distance: Tensor
    n_iter: int


def kmeans(
    rows: Tensor,
    n_clusters: int,
    *,
    init: str = "k-means++",
    n_init: int = 1,
    n_iter: int = 50,
    tol: float = 1e-6,
    distance: str = "euclidean",
    seed: int = 0,
) -> Clusters:
    """Group rows around centers that are the means of their rows.

    A center without rows keeps its place. The same rows in the same order and the same seed give the same
    centers, for any number of threads.

    Args:
        rows: (N, D), N >= 1, finite, floating point, any device.
        n_clusters: K, at least 1. Where N <= K the rows themselves are the centers, N of them.
        init: "k-means++": each further center is a row drawn with a chance that grows with its squared
            distance to the nearest center drawn so far (evenly once all rows are centers); "random-rows":
            K distinct rows, all sets alike.
        n_init: starts; the one with the smallest sum of squared distances is kept, the first among equals.
        n_iter: most iterations of a start, at least 1.
        tol: stop when no center moves farther than this, Euclidean.
        distance: "euclidean"; or "cosine": rows are scaled to unit length first and centers after every
            iteration, so that the nearest center is the one of the largest cosine. A zero row stays zero.
        seed: of the starts.

    Returns:
        Centers, and the nearest of them for every row. Ties go to the smaller index.

    Raises:
        InputError: rows are no floating-point matrix, none, or hold NaN or inf; an argument out of range.

    References:
        Lloyd, "Least squares quantization in PCM", IEEE Transactions on Information Theory 28, 1982.
        Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007.

    >>> found = kmeans(torch.tensor([[0.0], [1.0], [9.0], [11.0]]), 2)
    >>> sorted(found.centers.flatten().tolist()), found.sq_distance.tolist()
    ([0.5, 10.0], [0.25, 0.25, 1.0, 1.0])
    """
    check_arguments(n_clusters, init, n_init, n_iter, tol, distance)
    if rows.dim() != 2 or 0 in rows.shape or not rows.is_floating_point():
        raise InputError(
            f"kmeans: rows must be a floating-point matrix (N, D) with N, D >= 1, "
            f"got {rows.dtype} {tuple(rows.shape)}"
        )
    broken = (~rows.isfinite().all(dim=1)).nonzero()
    if len(broken):
        raise InputError(f"kmeans: row {int(broken[0])} holds NaN or inf; leave such rows out")
    rows = rows.detach()
    rows = rows if rows.dtype == torch.float64 else rows.float()
    rows = normalize_rows(rows) if distance == "cosine" else rows
    if rows.shape[0] <= n_clusters:
        return Clusters(rows.clone(), *kmeans_step(rows, rows)[:2], 0)
    generator = torch.Generator().manual_seed(seed)
    starts = [_start(rows, n_clusters, init, generator) for _ in range(n_init)]
    found = [_lloyd(rows, start, n_iter, tol, distance == "cosine") for start in starts]
    return min(found, key=lambda clusters: float(clusters.sq_distance.double().sum()))


def check_arguments(n_clusters: int, init: str, n_init: int, n_iter: int, tol: float, distance: str) -> None:
    """Hold what `kmeans` is asked for to its ranges.

    Raises:
        InputError: one is out of range.
    """
    for name, count in (("n_clusters", n_clusters), ("n_init", n_init), ("n_iter", n_iter)):
        if not isinstance(count, int) or count < 1:
            raise InputError(f"{name} must be a whole number, at least 1, got {count!r}")
    for name, value, known in (("init", init, INITS), ("distance", distance, DISTANCES)):
        if value not in known:
            raise InputError(f"unknown {name} {value!r}; one of {', '.join(known)}")
    if not 0 <= tol < math.inf:
        raise InputError(f"tol must be finite and at least 0, got {tol}")


def _start(rows: Tensor, k: int, init: str, generator: torch.Generator) -> Tensor:
    n = rows.shape[0]
    if init == "random-rows":
        return rows[torch.randperm(n, generator=generator)[:k].to(rows.device)]
    centers = rows.new_empty(k, rows.shape[1])
    centers[0] = rows[int(torch.randint(n, (1,), generator=generator))]
    gap = torch.full((n,), torch.inf, dtype=torch.float64, device=rows.device)
    for i in range(1, k):
        gap = torch.minimum(gap, kmeans_step(rows, centers[i - 1 : i])[1].double())
        chance = gap if bool(gap.any()) else torch.ones_like(gap)
        total = chance.cpu().cumsum(0)
        drawn = torch.rand(1, generator=generator, dtype=torch.float64) * total[-1]
        centers[i] = rows[int(torch.searchsorted(total, drawn, right=True).clamp(max=n - 1))]
    return centers


def _lloyd(rows: Tensor, centers: Tensor, n_iter: int, tol: float, unit: bool) -> Clusters:
    done, moved = 0, math.inf
    while done < n_iter and moved > tol:
        _, _, sums, counts = kmeans_step(rows, centers)
        means = sums / counts.clamp(min=1)[:, None]
        means = normalize_rows(means) if unit else means
        means = torch.where(counts[:, None] > 0, means, centers)
        moved = float((means - centers).norm(dim=1).max())
        centers, done = means, done + 1
    index, sq_distance, _, _ = kmeans_step(rows, centers)
    return Clusters(centers, index, sq_distance, done)
