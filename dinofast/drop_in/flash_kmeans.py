"""flash-kmeans' batched k-means on `kmeans_step`."""

from __future__ import annotations

from typing import Any

import torch

from dinofast.errors import InputError
from dinofast.interop import like, to_tensor
from dinofast.ops import kmeans_step


def batch_kmeans_Euclid(
    x: Any,
    n_clusters: int,
    max_iters: int = 100,
    tol: float = 0.0,
    init_centroids: Any = None,
    verbose: bool = False,
    *,
    use_heuristic: bool = True,
    backend: str = "triton",
    seed: int = 0,
) -> tuple[Any, Any, int]:
    """Cluster every set of rows of a batch by Lloyd's iteration; the sets do not share centers.

    An empty cluster keeps its center; a row goes to the first of equally near centers.

    Args:
        x: rows (B, N, D), N >= 1, finite.
        n_clusters: K, at least 1.
        max_iters: iterations at most, at least 1.
        tol: once no center of any set would move by `tol`, the iteration ends and none is moved; 0 goes on
            to `max_iters`.
        init_centroids: (B, K, D) to start from; None draws rows, the same one perhaps twice.
        verbose: kept and not used.
        use_heuristic: kept and not used.
        backend: kept and not used.
        seed: of the rows drawn; the host takes torch's global generator.

    Returns:
        Cluster of every row by the last centers that rows were compared with (B, N) int64; centers (B, K, D)
        in the dtype of `x`, moved once more unless `tol` ended the iteration; iterations made.

    Raises:
        InputError: no batch of rows, no clusters or iterations, centers of another shape, NaN or infinity.

    >>> ids, centers, n_iters = batch_kmeans_Euclid(torch.tensor([[[0.0], [1.0], [9.0]]]), 2, tol=1e-4)
    >>> sorted(centers.flatten().tolist())
    [0.5, 9.0]
    """
    rows = to_tensor(x, "x").detach()
    if rows.dim() != 3 or 0 in rows.shape[1:]:
        raise InputError(f"x must be (B, N, D), got {tuple(rows.shape)}")
    (b, n, d), k = rows.shape, n_clusters
    if min(k, max_iters) < 1:
        raise InputError(f"n_clusters and max_iters must be at least 1, got {k} and {max_iters}")
    if init_centroids is None:
        drawn = torch.randint(n, (b, k), generator=torch.Generator().manual_seed(seed)).to(rows.device)
        centers = rows.gather(1, drawn[..., None].expand(-1, -1, d)).float()
    else:
        centers = to_tensor(init_centroids, "init_centroids").detach().to(rows.device, torch.float32)
    if centers.shape != (b, k, d):
        raise InputError(f"init_centroids must be {(b, k, d)}, got {tuple(centers.shape)}")
    if not bool(rows.isfinite().all() and centers.isfinite().all()):
        raise InputError("x or init_centroids holds NaN or infinite values")
    ids, n_iters = torch.zeros(b, n, dtype=torch.int64, device=rows.device), 0
    while b and n_iters < max_iters:
        n_iters += 1
        moved = centers.clone()
        for i in range(b):
            ids[i], _, sums, counts = kmeans_step(rows[i], centers[i])
            some = counts > 0
            moved[i, some] = sums[some] / counts[some, None]
        if float((moved - centers).norm(dim=2).max()) < tol:
            break
        centers = moved
    return like(ids, x), like(centers.to(rows.dtype), x), n_iters
