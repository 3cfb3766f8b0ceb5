"""fastkmeans' class on `kmeans_step`: faiss's names and scikit-learn's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dinofast.drop_in.kmeans_rows import rows_of
from dinofast.errors import InputError
from dinofast.interop import like, on_callers_stream
from dinofast.ops import kmeans_step

if TYPE_CHECKING:
    from typing_extensions import Self


@on_callers_stream
class FastKMeans:
    """Cluster rows into k groups by Lloyd's iteration from random rows; an empty cluster restarts at one.

    Args:
        d: channels D.
        k: clusters.
        niter: iterations at most.
        tol: once the centers' moves sum to less, the iteration ends.
        gpu: kept and not used; rows are clustered where they are.
        seed: of all draws.
        max_points_per_centroid: rows beyond k times this are left out, drawn by the seed; None takes all.
        chunk_size_data: kept and not used, as memory stays small without.
        chunk_size_centroids: kept and not used.
        device: kept and not used, as `gpu`.
        dtype: kept and not used; sums are float32 or wider.
        pin_gpu_memory: kept and not used.
        verbose: kept and not used.
        nredo: 1, as for the host.
        use_triton: kept and not used; `kmeans_step` chooses its kernel.

    Attributes:
        centroids: (k, D) float32 NumPy after `train`, else None.

    Raises:
        InputError: a number below 1, or `nredo` is not 1.

    >>> import numpy as np
    >>> rows = np.array([[0, 0], [0, 1], [9, 9], [9, 8]], np.float32)
    >>> FastKMeans(2, 2).fit_predict(rows).tolist() in ([0, 0, 1, 1], [1, 1, 0, 0])
    True
    """

    def __init__(
        self,
        d: int,
        k: int,
        niter: int = 25,
        tol: float = 1e-8,
        gpu: bool = True,
        seed: int = 0,
        max_points_per_centroid: int | None = 1_000_000_000,
        chunk_size_data: int = 51200,
        chunk_size_centroids: int = 10240,
        device: Any = None,
        dtype: Any = None,
        pin_gpu_memory: bool = True,
        verbose: bool = False,
        nredo: int = 1,
        use_triton: bool | None = None,
    ) -> None:
        if min(d, k, niter, 1 if max_points_per_centroid is None else max_points_per_centroid) < 1:
            raise InputError(
                f"d, k, niter and max_points_per_centroid must be at least 1, got {d}, {k}, {niter} and "
                f"{max_points_per_centroid}"
            )
        if nredo != 1:
            raise InputError(f"nredo must be 1, got {nredo}; train with several seeds and keep the best")
        self.d, self.k, self.niter, self.tol, self.seed = d, k, niter, tol, seed
        self.gpu, self.max_points_per_centroid = gpu, max_points_per_centroid
        self.chunk_size_data, self.chunk_size_centroids = chunk_size_data, chunk_size_centroids
        self.device, self.dtype, self.pin_gpu_memory = device, dtype, pin_gpu_memory
        self.verbose, self.use_triton = verbose, use_triton
        self.centroids: Any = None

    def train(self, data: Any) -> None:
        """Find the centroids of rows (N, D), finite, N >= k.

        Args:
            data: an array of any library or lists; all but float16 and bfloat16 is taken as float32.

        Raises:
            InputError: fewer rows than clusters, another D, NaN or infinite rows.
        """
        rows = self._rows(data)
        if len(rows) < self.k or not bool(rows.isfinite().all()):
            raise InputError(f"train wants {self.k} finite rows or more, got {len(rows)}, or NaN or infinity")
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        centers = rows[order[: self.k]].float()
        if self.max_points_per_centroid is not None:
            rows = rows[order[: self.k * self.max_points_per_centroid].sort().values]
        for _ in range(self.niter):
            _, _, sums, counts = kmeans_step(rows, centers)
            moved = sums / counts.clamp(min=1)[:, None]
            empty = counts == 0
            again = torch.randint(len(rows), (int(empty.sum()),), generator=generator).to(rows.device)
            moved[empty] = rows[again].float()
            shift = float((moved - centers).norm(dim=1).sum())
            centers = moved
            if shift < self.tol:
                break
        self.centroids = centers.cpu().numpy()

    def fit(self, data: Any) -> Self:
        """See `train`; gives the object itself."""
        self.train(data)
        return self

    def predict(self, data: Any) -> Any:
        """Give the nearest centroid of every row (N, D), the first of equal ones: (N,), int64.

        Raises:
            InputError: not trained, or another D.
        """
        if self.centroids is None:
            raise InputError("there are no centroids yet; call train first")
        rows = self._rows(data)
        return like(kmeans_step(rows, torch.from_numpy(self.centroids).to(rows.device))[0], data)

    def fit_predict(self, data: Any) -> Any:
        """Train, then give the cluster of every row, those left out of the training included."""
        return self.fit(data).predict(data)

    def _rows(self, data: Any) -> Tensor:
        rows = rows_of(data, "data")
        if rows.dim() != 2 or rows.shape[1] != self.d:
            raise InputError(f"data must be (N, {self.d}), got {tuple(rows.shape)}")
        return rows
