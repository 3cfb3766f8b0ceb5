"""flash-kmeans' batched k-means on `kmeans_step`."""

from __future__ import annotations

from typing import Any

import torch

from dinofast.drop_in.kmeans_rows import rows_of
from dinofast.errors import InputError
from dinofast.interop import is_array, like, on_callers_stream, to_tensor
from dinofast.ops import kmeans_step

BACKENDS = ("triton", "cute", "torch")
"""The host's."""


@on_callers_stream
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
        x: rows (B, N, D), N >= 1, finite; an array of any library or lists. All but float16 and bfloat16 is
            computed as float32.
        n_clusters: K, at least 1.
        max_iters: iterations at most, at least 1.
        tol: once no center of any set would move by `tol`, the iteration ends and none is moved; 0 goes on
            to `max_iters`.
        init_centroids: (B, K, D) to start from; None draws rows, the same one perhaps twice.
        verbose: kept and not used.
        use_heuristic: kept and not used.
        backend: one of the host's, and not used: `kmeans_step` chooses its kernel.
        seed: of the rows drawn; the host takes torch's global generator.

    Returns:
        Cluster of every row by the last centers that rows were compared with (B, N) int64; centers (B, K, D)
        in the dtype of `x`, float32 if that has no fractions, moved once more unless `tol` ended the
        iteration; iterations made.

    Raises:
        InputError: no batch of rows, no clusters or iterations, centers of another shape, NaN or infinity, or
            another backend.

    >>> ids, centers, n_iters = batch_kmeans_Euclid(torch.tensor([[[0.0], [1.0], [9.0]]]), 2, tol=1e-4)
    >>> sorted(centers.flatten().tolist())
    [0.5, 9.0]
    """
    if backend not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    rows = rows_of(x, "x")
    if rows.dim() != 3 or 0 in rows.shape[1:]:
        raise InputError(f"x must be (B, N, D), got {tuple(rows.shape)}")
    (b, n, d), k = rows.shape, n_clusters
    if min(k, max_iters) < 1:
        raise InputError(f"n_clusters and max_iters must be at least 1, got {k} and {max_iters}")
    if init_centroids is None:
        drawn = torch.randint(n, (b, k), generator=torch.Generator().manual_seed(seed)).to(rows.device)
        centers = rows.gather(1, drawn[..., None].expand(-1, -1, d)).float()
    else:
        centers = rows_of(init_centroids, "init_centroids").to(rows.device, torch.float32)
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
    given = to_tensor(x).dtype if is_array(x) else rows.dtype
    centers = centers.to(given if given.is_floating_point else rows.dtype)
    return like(ids, x), like(centers, x), n_iters
