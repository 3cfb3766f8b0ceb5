"""scikit-learn's unsupervised nearest neighbors on `knn_topk`: exact, without the (Q, M) matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from dinofast.drop_in.sklearn_rows import check_choice, check_number, check_whole, is_device_array, rows_of
from dinofast.errors import InputError
from dinofast.interop import like, on_callers_stream, on_stream_of
from dinofast.ops import Bank, knn_topk
from dinofast.ops.rows import result_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

METRICS = ("cosine", "euclidean", "l2", "minkowski")
ALGORITHMS = ("auto", "brute", "kd_tree", "ball_tree")
MODES = ("connectivity", "distance")
FIRST_LOOK = 64
"""Neighbors that a search by radius asks for first."""


@on_callers_stream
class NearestNeighbors(BaseEstimator):  # type: ignore[misc]
    """Find the nearest of the fitted rows, exactly.

    Args:
        n_neighbors: k, where a call names none.
        radius: where a call names none.
        algorithm: kept; every search is exhaustive, or as good.
        leaf_size: kept and not used.
        metric: "cosine": 1 − cosine, a zero row being at distance 1 from everything; "euclidean", "l2", or
            "minkowski" with p = 2.
        p: 2.
        metric_params: None.
        n_jobs: kept; torch's number of threads counts.

    Attributes:
        n_features_in_: D.
        n_samples_fit_: rows M.
        effective_metric_: "euclidean" for "minkowski", else the metric.
        effective_metric_params_: empty.

    Neighbors at equal distance come in the order of the rows, which scikit-learn does not promise.

    >>> search = NearestNeighbors(n_neighbors=2).fit(np.array([[0.0], [1.0], [5.0]]))
    >>> distance, index = search.kneighbors(np.array([[4.0]]))
    >>> distance.tolist(), index.tolist()
    ([[1.0, 3.0]], [[2, 1]])
    """

    def __init__(
        self,
        *,
        n_neighbors: int = 5,
        radius: float = 1.0,
        algorithm: str = "auto",
        leaf_size: int = 30,
        metric: str = "minkowski",
        p: float = 2,
        metric_params: dict[str, Any] | None = None,
        n_jobs: int | None = None,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.radius = radius
        self.algorithm = algorithm
        self.leaf_size = leaf_size
        self.metric = metric
        self.p = p
        self.metric_params = metric_params
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any = None) -> Self:
        """Take over the rows (M, D) to search in.

        Raises:
            ValueError: a parameter out of range, no rows, or NaN among them.
        """
        check_choice(METRICS, metric=self.metric)
        check_choice(ALGORITHMS, algorithm=self.algorithm)
        check_whole(1, n_neighbors=self.n_neighbors)
        check_number(0, radius=self.radius)
        if (self.metric == "minkowski" and self.p != 2) or self.metric_params:
            raise InputError(
                f"only p = 2 without metric_params is offered, got p = {self.p} and {self.metric_params}"
            )
        rows = rows_of(self, X, reset=True)
        self.effective_metric_ = "euclidean" if self.metric == "minkowski" else self.metric
        self.effective_metric_params_: dict[str, Any] = {}
        self.n_samples_fit_ = len(rows)
        self._name = "cosine" if self.metric == "cosine" else "euclidean"
        self._kind = X[:0] if is_device_array(X) else None
        wide = result_dtype(rows) == torch.float64
        self._bank: Tensor | Bank = rows.clone() if wide else Bank(rows, self._name)
        return self

    def kneighbors(self, X: Any = None, n_neighbors: int | None = None, return_distance: bool = True) -> Any:
        """Find the k nearest rows of every query.

        Args:
            X: queries (Q, D); None asks for every fitted row, which is then not its own neighbor.
            n_neighbors: k; None is the estimator's.
            return_distance: whether distances come, too.

        Returns:
            Distances (Q, k), ascending, and row numbers (Q, k), or the latter alone.

        Raises:
            ValueError: k out of range, another D, or NaN queries.
        """
        check_is_fitted(self)
        k = self.n_neighbors if n_neighbors is None else n_neighbors
        check_whole(1, n_neighbors=k)
        others = self.n_samples_fit_ - (X is None)
        if k > others:
            raise InputError(
                f"Expected n_neighbors <= n_samples_fit, but n_neighbors = {k} and there are {others} rows "
                f"to choose from, n_samples_fit = {self.n_samples_fit_}"
            )
        kind = self._kind if X is None else X
        with on_stream_of(kind):
            if X is None:
                distance, index = self._search(self._rows, k + 1)
                own = index == torch.arange(len(index), device=index.device)[:, None]
                own[~own.any(1), 0] = True  # equal rows crowd it out; one of them goes in its place
                distance, index = distance[~own].view(-1, k), index[~own].view(-1, k)
            else:
                distance, index = self._search(self._queries(X), k)
            found = like(distance, kind), like(index, kind)
        return found if return_distance else found[1]

    def radius_neighbors(
        self,
        X: Any = None,
        radius: float | None = None,
        return_distance: bool = True,
        sort_results: bool = False,
    ) -> Any:
        """Find all rows within a distance of every query.

        Args:
            X: queries (Q, D); None asks for every fitted row, which is then not its own neighbor.
            radius: the distance, itself included; None is the estimator's.
            return_distance: whether distances come, too.
            sort_results: whether neighbors come by distance; else by number.

        Returns:
            Arrays (Q,) of arrays: distances and row numbers, or the latter alone.

        Raises:
            ValueError: a radius below 0, another D, NaN queries, or results sorted without distances.
        """
        check_is_fitted(self)
        limit = self.radius if radius is None else radius
        check_number(0, radius=limit)
        if sort_results and not return_distance:
            raise InputError("sort_results needs return_distance")
        kind = self._kind if X is None else X
        with on_stream_of(kind):
            queries = self._rows if X is None else self._queries(X)
            distances, indices = self._within(
                queries, float(limit), skip_own=X is None, by_distance=sort_results
            )
            found = _ragged(distances, kind), _ragged(indices, kind)
        return found if return_distance else found[1]

    def kneighbors_graph(
        self, X: Any = None, n_neighbors: int | None = None, mode: str = "connectivity"
    ) -> csr_matrix:
        """Give the k nearest rows of every query as a sparse matrix (Q, M).

        Args:
            X: see `kneighbors`.
            n_neighbors: see `kneighbors`.
            mode: "connectivity" writes ones, "distance" distances.

        Raises:
            ValueError: see `kneighbors`, or an unknown mode.
        """
        check_choice(MODES, mode=mode)
        distance, index = self.kneighbors(X, n_neighbors)
        queries, k = index.shape
        return self._graph(_numpy(distance).ravel(), _numpy(index).ravel(), np.full(queries, k), mode)

    def radius_neighbors_graph(
        self,
        X: Any = None,
        radius: float | None = None,
        mode: str = "connectivity",
        sort_results: bool = False,
    ) -> csr_matrix:
        """Give all rows within a distance as a sparse matrix (Q, M). See `kneighbors_graph`."""
        check_choice(MODES, mode=mode)
        distances, indices = self.radius_neighbors(X, radius, True, sort_results)
        counts = np.array([len(index) for index in indices])
        flat = [np.concatenate([_numpy(part) for part in parts]) for parts in (distances, indices)]
        return self._graph(flat[0], flat[1], counts, mode)

    def _graph(self, distance: Any, index: Any, counts: Any, mode: str) -> csr_matrix:
        data = np.ones(len(index)) if mode == "connectivity" else distance
        ends = np.concatenate([[0], np.cumsum(counts)])
        return csr_matrix((data, index, ends), shape=(len(counts), self.n_samples_fit_))

    @property
    def _rows(self) -> Tensor:
        """The fitted rows, or others in their directions where only these count."""
        return self._bank.rows if isinstance(self._bank, Bank) else self._bank

    def _queries(self, X: Any) -> Tensor:
        return rows_of(self, X).to(self._rows.device, self._rows.dtype)

    def _search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return knn_topk(queries, self._bank, k, self._name)

    def _within(
        self, queries: Tensor, limit: float, *, skip_own: bool, by_distance: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Ask for more and more neighbors of the queries whose last one still lies within the limit."""
        distances: list[Tensor] = [queries.new_empty(0)] * len(queries)
        indices: list[Tensor] = [queries.new_empty(0, dtype=torch.int64)] * len(queries)
        left, k = torch.arange(len(queries), device=queries.device), min(FIRST_LOOK, self.n_samples_fit_)
        while len(left):
            distance, index = self._search(queries[left], k)
            inside = distance <= limit
            done = ~inside[:, -1] | (k == self.n_samples_fit_)
            if skip_own:
                inside &= index != left[:, None]
            for row in done.nonzero()[:, 0].tolist():
                number, near, which = int(left[row]), distance[row][inside[row]], index[row][inside[row]]
                order = slice(None) if by_distance else which.argsort()
                distances[number], indices[number] = near[order], which[order]
            left, k = left[~done], min(4 * k, self.n_samples_fit_)
        return distances, indices


def _ragged(parts: list[Tensor], kind: Any) -> Any:
    found = np.empty(len(parts), dtype=object)
    for row, part in enumerate(parts):
        found[row] = like(part, kind)
    return found


def _numpy(array: Any) -> Any:
    return array.cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
