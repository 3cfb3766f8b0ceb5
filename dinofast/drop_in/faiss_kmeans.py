"""faiss's k-means on `kmeans_step`: random rows to start from, empty clusters split off the largest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dinofast.errors import InputError
from dinofast.interop import like, on_callers_stream, to_tensor
from dinofast.ops import kmeans_step

if TYPE_CHECKING:
    from dinofast.drop_in.faiss import IndexFlat

_SPLIT = 1 / 1024
"""Share by which the two halves of a split cluster move apart."""


@on_callers_stream
class Kmeans:
    """Cluster rows into k groups.

    Args:
        d: channels D.
        k: clusters.
        niter: iterations at most; they end when the objective stands still.
        nredo: runs from other rows; the one with the lowest objective counts.
        spherical: scale centroids to unit length after every iteration, and assign by inner product.
        gpu: kept and not used; rows are clustered where they are.
        seed: of the rows to start from.
        max_points_per_centroid: rows beyond k times this are left out, drawn by the seed.
        verbose: kept and not used.

    Attributes:
        centroids: (k, D) float32 NumPy after `train`.
        obj: objective (sum of squared distances, or of inner products) before each iteration's update.
        index: flat index of the centroids.

    >>> rows = np.array([[0, 0], [0, 1], [9, 9], [9, 8]], np.float32)
    >>> kmeans = Kmeans(2, 2, niter=5)
    >>> kmeans.train(rows), sorted(kmeans.centroids[:, 1].tolist())
    (1.0, [0.5, 8.5])
    """

    def __init__(
        self,
        d: int,
        k: int,
        niter: int = 25,
        nredo: int = 1,
        spherical: bool = False,
        gpu: bool | int = False,
        seed: int = 1234,
        max_points_per_centroid: int = 256,
        verbose: bool = False,
    ) -> None:
        if min(d, k, niter, nredo, max_points_per_centroid) < 1:
            raise InputError(
                f"d, k, niter, nredo and max_points_per_centroid must be at least 1, got {d}, {k}, {niter}, "
                f"{nredo} and {max_points_per_centroid}"
            )
        self.d, self.k, self.niter, self.nredo = d, k, niter, nredo
        self.spherical, self.gpu, self.seed, self.verbose = spherical, gpu, seed, verbose
        self.max_points_per_centroid = max_points_per_centroid
        self.centroids: Any = None
        self.obj: Any = None
        self.index: IndexFlat | None = None

    def train(self, x: Any, weights: Any = None, init_centroids: Any = None) -> float:
        """Find the centroids.

        Args:
            x: rows (N, D), finite, N >= k.
            weights: must be None.
            init_centroids: (k, D) to start from, or None for random rows.

        Returns:
            The last objective.

        Raises:
            InputError: fewer rows than clusters, NaN or infinite rows, another D, or weights.
        """
        from dinofast.drop_in.faiss import IndexFlatIP, IndexFlatL2

        if weights is not None:
            raise InputError("weighted rows are not offered; repeat rows instead")
        rows = to_tensor(x, "x").detach().to(torch.float32)
        if rows.dim() != 2 or rows.shape[1] != self.d or len(rows) < self.k:
            raise InputError(f"x must be (N, {self.d}) with N >= {self.k}, got {tuple(rows.shape)}")
        if not bool(rows.isfinite().all()):
            raise InputError("x holds NaN or infinite values; remove those rows")
        best: tuple[float, Tensor, list[float]] | None = None
        for run in range(self.nredo):
            generator = torch.Generator().manual_seed(self.seed + run)
            order = torch.randperm(len(rows), generator=generator)
            used = rows[order[: self.k * self.max_points_per_centroid].sort().values.to(rows.device)]
            start = rows[order[: self.k].to(rows.device)]
            if init_centroids is not None:
                start = to_tensor(init_centroids, "init_centroids").to(rows)
                if start.shape != (self.k, self.d):
                    raise InputError(f"init_centroids must be ({self.k}, {self.d}), got {tuple(start.shape)}")
            centers, objective = self._lloyd(used, start)
            key = -objective[-1] if self.spherical else objective[-1]
            if best is None or key < best[0]:
                best = key, centers, objective
        assert best is not None
        _, centers, objective = best
        self.centroids, self.obj = centers.cpu().numpy(), np.array(objective)
        self.index = (IndexFlatIP if self.spherical else IndexFlatL2)(self.d)
        self.index.add(self.centroids)
        return objective[-1]

    def assign(self, x: Any) -> tuple[Any, Any]:
        """Give each row's distance to its centroid (N,), squared, and the centroid's number (N,).

        Raises:
            InputError: not trained, or another D.
        """
        if self.index is None:
            raise InputError("these k-means have no centroids yet; call train first")
        distance, index = (to_tensor(found)[:, 0] for found in self.index.search(x, 1))
        return like(distance, x), like(index, x)

    def _lloyd(self, rows: Tensor, centers: Tensor) -> tuple[Tensor, list[float]]:
        objective = []
        if self.spherical:
            centers = _unit(centers)
        for _ in range(self.niter):
            _index, distance, sums, counts = kmeans_step(rows, centers)
            total = float(distance.double().sum())
            if self.spherical:  # unit centers: the nearest one has the largest product
                total = float((rows.double().square().sum() + len(rows) - total) / 2)
            objective.append(total)
            if objective[-2:-1] == [total]:
                break
            centers = _split_empty(sums / counts.clamp(min=1)[:, None], counts)
            if self.spherical:
                centers = _unit(centers)
        return centers, objective


def _unit(rows: Tensor) -> Tensor:
    norm = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(norm > 0, norm, 1)


def _split_empty(centers: Tensor, counts: Tensor) -> Tensor:
    """Give each empty cluster half of the largest one: the two centers move apart by a small share."""
    left = counts.double().clone()
    sign = torch.where(torch.arange(centers.shape[1], device=centers.device) % 2 == 0, _SPLIT, -_SPLIT)
    for empty in (counts == 0).nonzero()[:, 0].tolist():
        largest = int(left.argmax())
        centers[empty] = centers[largest] * (1 + sign)
        centers[largest] = centers[largest] * (1 - sign)
        left[empty] = left[largest] / 2
        left[largest] /= 2
    return centers
