"""scikit-learn's k-means on `kmeans_step`: Lloyd's iteration from scikit-learn's own starts."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.cluster import kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from dinofast.drop_in.sklearn_rows import as_floats, check_choice, check_number, check_whole, rows_of
from dinofast.errors import InputError
from dinofast.interop import like, on_callers_stream, to_tensor
from dinofast.ops import kmeans_step
from dinofast.ops.rows import BLOCK, result_dtype, row_blocks

if TYPE_CHECKING:
    from typing_extensions import Self


@on_callers_stream
class KMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """Cluster rows into k groups by Lloyd's iteration.

    The same `random_state` starts from the same rows as in scikit-learn, drawn on the CPU by its own
    functions; iterations, their end and what becomes of empty clusters are scikit-learn's, too.

    Args:
        n_clusters: k.
        init: "k-means++", "random", centers (k, D), or a function of (X, n_clusters, random_state) that gives
            them.
        n_init: starts, of which the one with the lowest inertia counts; "auto" is 1, but 10 for "random" and
            functions.
        max_iter: iterations at most.
        tol: iterations end when the squared shifts of the centers sum to at most this share of the mean
            variance of the channels, or when no row changes its cluster.
        verbose: kept and not used.
        random_state: of the starts.
        copy_x: kept; rows are never changed.
        algorithm: "lloyd"; "elkan" gives the same.

    Attributes:
        cluster_centers_: (k, D).
        labels_: (N,), int32.
        inertia_: weighted sum of the squared distances to the centers.
        n_iter_: iterations made.
        n_features_in_: D.

    >>> rows = np.array([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0], [9.0, 8.0]])
    >>> kmeans = KMeans(2, random_state=0).fit(rows)
    >>> sorted(kmeans.cluster_centers_[:, 1].tolist()), kmeans.inertia_
    ([0.5, 8.5], 1.0)
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        verbose: int = 0,
        random_state: Any = None,
        copy_x: bool = True,
        algorithm: str = "lloyd",
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.verbose = verbose
        self.random_state = random_state
        self.copy_x = copy_x
        self.algorithm = algorithm

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:
        """Find the centers.

        Args:
            X: rows (N, D), N >= k, finite.
            y: not used.
            sample_weight: (N,), or None for equal weights.

        Raises:
            ValueError: a parameter out of range, fewer rows than clusters, or NaN among them.
        """
        check_whole(1, n_clusters=self.n_clusters, max_iter=self.max_iter)
        check_number(0, tol=self.tol)
        check_choice(("lloyd", "elkan"), algorithm=self.algorithm)
        rows = rows_of(self, X, reset=True)
        if len(rows) < self.n_clusters:
            raise InputError(f"n_samples={len(rows)} should be >= n_clusters={self.n_clusters}.")
        weights = _weights(sample_weight, rows)
        tolerance = self.tol * float(rows.to(result_dtype(rows)).var(0, correction=0).mean())
        random_state = check_random_state(self.random_state)
        best: tuple[float, Tensor, Tensor, int] | None = None
        for _ in range(self._runs()):
            centers = self._start(X, rows, weights, random_state)
            run = _lloyd(rows, centers, weights, self.max_iter, tolerance)
            if best is None or (run[0] < best[0] and not _same_clusters(run[1], best[1])):
                best = run
        assert best is not None
        self.inertia_, labels, centers, self.n_iter_ = best
        distinct = len(set(labels.tolist()))
        if distinct < self.n_clusters:
            warnings.warn(
                f"{distinct} distinct clusters found for n_clusters = {self.n_clusters}; rows may be equal",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.cluster_centers_, self.labels_ = like(centers, X), like(labels.int(), X)
        self._n_features_out = self.n_clusters
        return self

    def predict(self, X: Any) -> Any:
        """Give the nearest center of every row, (N,), int32; the smallest number among equal ones."""
        return like(self._assigned(X)[1].int(), X)

    def transform(self, X: Any) -> Any:
        """Give the distance of every row to every center, (N, k)."""
        rows, centers = self._fitted(X)
        wide = centers.double()
        found = rows.new_empty((len(rows), len(centers)), dtype=centers.dtype)
        start = 0
        for block in row_blocks(rows, BLOCK // max(wide.shape)):
            part = block.double()
            square = part.square().sum(1, keepdim=True) - 2 * part @ wide.T + wide.square().sum(1)
            found[start : start + len(part)] = square.clamp_min(0).sqrt()
            start += len(part)
        return like(found, X)

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Give the negative inertia of rows: higher is nearer to the centers."""
        rows, _, distance = self._assigned(X)
        return -_weighted_sum(distance, _weights(sample_weight, rows))

    def _runs(self) -> int:
        if isinstance(self.init, str):
            check_choice(("k-means++", "random"), init=self.init)
        elif not callable(self.init):
            return 1
        if isinstance(self.n_init, str):
            check_choice(("auto",), n_init=self.n_init)
            return 1 if isinstance(self.init, str) and self.init == "k-means++" else 10
        check_whole(1, n_init=self.n_init)
        return self.n_init

    def _start(self, X: Any, rows: Tensor, weights: Tensor | None, random_state: Any) -> Tensor:
        """Give centers (k, D) to start from, in the dtype that `kmeans_step` wants."""
        if isinstance(self.init, str):
            share = None if weights is None else weights.cpu().numpy()
            if self.init == "random":
                share = np.ones(len(rows)) if share is None else share
                odds = share / share.sum()  # always given, as it changes what is drawn
                chosen = random_state.choice(len(rows), size=self.n_clusters, replace=False, p=odds)
            else:
                plain = rows.to(result_dtype(rows)).sub(rows.mean(0)).cpu().numpy()
                chosen = kmeans_plusplus(
                    plain, self.n_clusters, sample_weight=share, random_state=random_state
                )[1]
            return rows[torch.as_tensor(chosen, device=rows.device)].to(result_dtype(rows))
        given = self.init(X, self.n_clusters, random_state=random_state) if callable(self.init) else self.init
        centers = to_tensor(given if isinstance(given, Tensor) else np.asarray(given), "init").detach()
        if centers.shape != (self.n_clusters, rows.shape[1]):
            raise InputError(
                f"init must give centers ({self.n_clusters}, {rows.shape[1]}), got {tuple(centers.shape)}"
            )
        if not bool(centers.isfinite().all()):
            raise InputError("init holds NaN or infinite values")
        return centers.to(rows.device, result_dtype(rows))

    def _fitted(self, X: Any) -> tuple[Tensor, Tensor]:
        check_is_fitted(self)
        rows = rows_of(self, X)
        centers = to_tensor(self.cluster_centers_, "cluster_centers_").to(rows.device)
        return as_floats(rows, centers.dtype), centers

    def _assigned(self, X: Any) -> tuple[Tensor, Tensor, Tensor]:
        rows, centers = self._fitted(X)
        index, distance, _, _ = kmeans_step(rows, centers)
        return rows, index, distance


def _lloyd(
    rows: Tensor, centers: Tensor, weights: Tensor | None, max_iter: int, tolerance: float
) -> tuple[float, Tensor, Tensor, int]:
    """Iterate from centers; gives inertia, labels, centers and iterations."""
    before: Tensor | None = None
    n_iter = 0
    while n_iter < max_iter:
        n_iter += 1
        labels, distance, sums, counts = kmeans_step(rows, centers)
        moved = _moved(rows, labels, distance, sums, counts, weights)
        shift = float((moved - centers).double().square().sum())
        centers = moved
        if before is not None and torch.equal(labels, before):
            break
        before = labels
        if shift <= tolerance:
            break
    labels, distance, _, _ = kmeans_step(rows, centers)
    return _weighted_sum(distance, weights), labels, centers, n_iter


def _moved(
    rows: Tensor, labels: Tensor, distance: Tensor, sums: Tensor, counts: Tensor, weights: Tensor | None
) -> Tensor:
    """Give the means of the clusters.

    Empty ones take over the rows farthest from their centers, which leave their own clusters. What is empty
    then, for want of distant rows, lies where the largest cluster does.
    """
    total, mass = sums.double(), counts.double()
    if weights is not None:
        total, mass = torch.zeros_like(total), torch.zeros_like(mass)
        mass.index_add_(0, labels, weights)
        start = 0
        for block in row_blocks(rows, BLOCK // rows.shape[1]):
            part = slice(start, start + len(block))
            total.index_add_(0, labels[part], block.double() * weights[part, None])
            start += len(block)
    empty = (mass == 0).nonzero()[:, 0].tolist()
    if empty and float(distance.max()) > 0:
        farthest = distance.topk(len(empty)).indices.tolist()
        for cluster, row in zip(empty, farthest, strict=True):
            weight = 1.0 if weights is None else float(weights[row])
            owner = int(labels[row])
            total[owner] -= weight * rows[row].double()
            mass[owner] -= weight
            total[cluster] = weight * rows[row].double()
            mass[cluster] = weight
    some = mass > 0
    means = total / torch.where(some, mass, 1)[:, None]
    return torch.where(some[:, None], means, means[mass.argmax()]).to(sums.dtype)


def _weights(sample_weight: Any, rows: Tensor) -> Tensor | None:
    """View sample weights as (N,) float64 beside the rows; a number stands for all."""
    if sample_weight is None:
        return None
    given = (
        sample_weight if isinstance(sample_weight, Tensor) else np.asarray(sample_weight, dtype=np.float64)
    )
    weights = to_tensor(given, "sample_weight").to(rows.device, torch.float64)
    if weights.dim() == 0:
        weights = weights.expand(len(rows))
    if weights.shape != (len(rows),) or not bool(weights.isfinite().all()) or bool((weights < 0).any()):
        raise InputError(
            f"sample_weight must be {len(rows)} finite numbers from 0, got {tuple(weights.shape)}"
        )
    if not bool((weights > 0).any()):
        raise InputError("sample_weight: every weight is zero; at least one row must count")
    return weights


def _weighted_sum(distance: Tensor, weights: Tensor | None) -> float:
    return float(distance.double().sum() if weights is None else (distance.double() * weights).sum())


def _same_clusters(labels: Tensor, others: Tensor) -> bool:
    """Say whether two labelings differ in the numbers of the clusters only."""
    ours, theirs = labels.tolist(), others.tolist()
    return len(set(zip(ours, theirs, strict=True))) == len(set(ours)) == len(set(theirs))
