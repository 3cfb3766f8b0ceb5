"""Names of faiss on dinofast's operators: flat indexes, id maps, k-means, and the files of these indexes.

Semantics are faiss's: L2 distances are squared and ascend, inner products descend, what is missing is −1 at
the largest distance (the smallest product), a query with NaN finds nothing, a row with NaN is never found.
Arrays may be NumPy, torch or CuPy; results are of the queries' kind. Among equal distances the smallest
number comes first, where faiss promises no order.

>>> index = IndexFlatL2(2)
>>> index.add(np.array([[0, 0], [3, 4]], np.float32))
>>> D, I = index.search(np.zeros((1, 2), np.float32), 3)
>>> D[0, :2].tolist(), I.tolist()
([0.0, 25.0], [[0, 1, -1]])
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinofast.drop_in import faiss_files
from dinofast.drop_in.faiss_id_map import IndexIDMap
from dinofast.drop_in.faiss_kmeans import Kmeans
from dinofast.drop_in.flat_search import (
    BLOCK,
    INNER_PRODUCT,
    L2,
    FlatSearch,
    matrix,
    row_numbers,
    squared_distances,
)
from dinofast.errors import InputError
from dinofast.interop import like, on_callers_stream, to_tensor

__all__ = [
    "METRIC_INNER_PRODUCT",
    "METRIC_L2",
    "GpuIndexFlatConfig",
    "GpuIndexFlatIP",
    "GpuIndexFlatL2",
    "IndexFlatIP",
    "IndexFlatL2",
    "IndexIDMap",
    "Kmeans",
    "StandardGpuResources",
    "get_num_gpus",
    "index_cpu_to_gpu",
    "index_gpu_to_cpu",
    "knn",
    "normalize_L2",
    "omp_get_max_threads",
    "omp_set_num_threads",
    "read_index",
    "write_index",
]

METRIC_INNER_PRODUCT, METRIC_L2 = INNER_PRODUCT, L2


@on_callers_stream
class IndexFlat:
    """Base of the flat indexes: all rows, searched exactly.

    Args:
        d: channels D.
        metric: METRIC_L2 or METRIC_INNER_PRODUCT.

    Attributes:
        d: as given.
        metric_type: as given.
        is_trained: True; nothing is to be trained.
        ntotal: rows held.
    """

    is_trained = True
    verbose = False

    def __init__(self, d: int, metric: int = METRIC_L2) -> None:
        if not isinstance(d, int) or d < 1:
            raise InputError(f"d must be a whole number, at least 1, got {d!r}")
        if metric not in (METRIC_L2, METRIC_INNER_PRODUCT):
            raise InputError(f"metric {metric!r}: METRIC_L2 ({METRIC_L2}) or METRIC_INNER_PRODUCT (0)")
        self.d, self.metric_type = d, metric
        self.reset()

    @property
    def ntotal(self) -> int:
        """Rows held."""
        return sum(len(block) for block in self._blocks)

    def train(self, x: Any) -> None:
        """Do nothing; flat indexes need no training."""

    def reset(self) -> None:
        """Drop all rows."""
        self._blocks: list[Tensor] = []
        self._search: FlatSearch | None = None

    def add(self, x: Any) -> None:
        """Append rows (N, D), copied to the host; they get the numbers ntotal, ntotal + 1, ...

        Raises:
            InputError: no matrix, or another D.
        """
        rows = matrix(x, self.d, "x").cpu()
        self._blocks.append(rows.clone() if rows.data_ptr() == to_tensor(x).data_ptr() else rows)
        self._search = None

    def search(self, x: Any, k: int, *, params: Any = None, D: Any = None, I: Any = None) -> tuple[Any, Any]:  # noqa: E741
        """Find the k nearest rows, or those of the largest inner product, of every query.

        Args:
            x: queries (Q, D).
            k: neighbors, at least 1; beyond ntotal the rest is missing.
            params: must be None.
            D: (Q, k) float32 to write distances to, or None.
            I: (Q, k) int64 to write numbers to, or None.

        Returns:
            Distances (Q, k) and row numbers (Q, k), nearest first.

        Raises:
            InputError: no matrix, another D, k < 1, or search parameters; D or I of another shape or dtype,
                read-only, or of a layout that torch cannot write to: nothing is written then.
        """
        if params is not None:
            raise InputError("search parameters are not offered; search without params")
        if not isinstance(k, int | np.integer) or k < 1:
            raise InputError(f"k must be a whole number, at least 1, got {k!r}")
        queries = matrix(x, self.d, "x")
        shape = len(queries), int(k)
        outs = _output(D, "D", shape, torch.float32), _output(I, "I", shape, torch.int64)
        distance, index = self._searcher(queries.device).search(queries, int(k))
        for out, found in zip(outs, (distance, index), strict=True):
            if out is not None:
                out.copy_(found)
        return (like(distance, x) if D is None else D), (like(index, x) if I is None else I)

    def range_search(self, x: Any, thresh: float) -> tuple[Any, Any, Any]:
        """Find all rows nearer than `thresh` (squared), or of an inner product above it.

        Args:
            x: queries (Q, D).
            thresh: the limit, itself excluded.

        Returns:
            lims (Q + 1,) uint64, D and I: those of query i are lims[i] : lims[i + 1], by number.
        """
        queries = matrix(x, self.d, "x")
        rows = self._rows().to(queries.device)
        step = max(1, BLOCK // max(len(rows), self.d))
        counts, distances, numbers = [torch.zeros(1, dtype=torch.int64)], [], []
        for start in range(0, len(queries), step):
            block = queries[start : start + step]
            if self.metric_type == METRIC_L2:
                value = squared_distances(block, rows)
                hit = value < thresh
            else:
                value = block @ rows.T
                hit = value > thresh
            counts.append(hit.sum(1).cpu())
            distances.append(value[hit])
            numbers.append(hit.nonzero()[:, 1])
        lims = torch.cat(counts).cumsum(0).numpy().astype(np.uint64)
        none = queries.new_zeros(0)
        found = torch.cat([*distances, none]), torch.cat([*numbers, none.long()])
        return lims, like(found[0], x), like(found[1], x)

    def assign(self, x: Any, k: int = 1) -> Any:
        """Give the numbers that `search` gives."""
        return self.search(x, k)[1]

    def reconstruct(self, key: int) -> Any:
        """Give row `key` (D,), a copy.

        Raises:
            InputError: there is no such row.
        """
        return self.reconstruct_n(key, 1)[0]

    def reconstruct_n(self, n0: int = 0, ni: int = -1) -> Any:
        """Give `ni` rows from `n0` on (ni, D), a copy; −1 gives all that follow.

        Raises:
            InputError: there are no such rows.
        """
        ni = self.ntotal - n0 if ni == -1 else ni
        if min(n0, ni) < 0 or n0 + ni > self.ntotal:
            raise InputError(f"rows {n0} to {n0 + ni - 1} of an index with {self.ntotal} rows")
        return self._rows()[n0 : n0 + ni].numpy().copy()

    def remove_ids(self, ids: Any) -> int:
        """Take rows out by number; later rows move up, and unknown numbers are passed over.

        Returns:
            How many rows were removed.
        """
        keep = torch.ones(self.ntotal, dtype=torch.bool)
        asked = row_numbers(ids)
        keep[asked[(asked >= 0) & (asked < self.ntotal)]] = False
        self._blocks, self._search = [self._rows()[keep]], None
        return int((~keep).sum())

    def _rows(self) -> Tensor:
        """Give all rows (M, D) in one tensor, on the host."""
        if len(self._blocks) != 1:
            self._blocks = [torch.cat([torch.empty(0, self.d), *self._blocks])]
        return self._blocks[0]

    def _searcher(self, device: torch.device) -> FlatSearch:
        if self._search is None or self._search.device != device:
            self._search = FlatSearch(self._rows().to(device), self.metric_type)
        return self._search


def _output(array: Any, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    """View an array that results are to be written to.

    Raises:
        InputError: of another shape or dtype, or it cannot be written to.
    """
    if array is None:
        return None
    tensor = to_tensor(array, name, writable=True)
    if tensor.shape != shape or tensor.dtype != dtype:
        raise InputError(f"{name} must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    return tensor


class IndexFlatL2(IndexFlat):
    """Search by squared Euclidean distance."""

    def __init__(self, d: int) -> None:
        super().__init__(d, METRIC_L2)


class IndexFlatIP(IndexFlat):
    """Search by inner product."""

    def __init__(self, d: int) -> None:
        super().__init__(d, METRIC_INNER_PRODUCT)


class StandardGpuResources:
    """Stand for GPU memory that faiss would set aside; torch's allocator does that here."""

    def noTempMemory(self) -> None:
        """Do nothing."""

    def setTempMemory(self, size: int) -> None:
        """Do nothing."""


class GpuIndexFlatConfig:
    """Options of a GPU index.

    Attributes:
        device: number of the GPU.
        useFloat16: kept and not used; rows are float32.
    """

    def __init__(self) -> None:
        self.device, self.useFloat16 = 0, False


class GpuIndexFlatL2(IndexFlatL2):
    """`IndexFlatL2` under its GPU name: searched where the queries are."""

    def __init__(
        self, resources: StandardGpuResources, d: int, config: GpuIndexFlatConfig | None = None
    ) -> None:
        super().__init__(d)


class GpuIndexFlatIP(IndexFlatIP):
    """`IndexFlatIP` under its GPU name: searched where the queries are."""

    def __init__(
        self, resources: StandardGpuResources, d: int, config: GpuIndexFlatConfig | None = None
    ) -> None:
        super().__init__(d)


@on_callers_stream
def normalize_L2(x: Any) -> None:
    """Scale rows (N, D) to unit length in place; zero rows stay.

    Raises:
        InputError: no float32 matrix, read-only, or of a layout that torch cannot write to.
    """
    tensor = to_tensor(x, "x", writable=True)
    if tensor.dim() != 2 or tensor.dtype != torch.float32:
        raise InputError(f"normalize_L2 wants a float32 matrix, got {tensor.dtype} {tuple(tensor.shape)}")
    norm = tensor.norm(dim=1, keepdim=True)
    tensor.div_(torch.where(norm > 0, norm, 1))


@on_callers_stream
def knn(xq: Any, xb: Any, k: int, metric: int = METRIC_L2) -> tuple[Any, Any]:
    """Find the k nearest rows of `xb` (M, D) for queries (Q, D), as `IndexFlat.search`."""
    rows = to_tensor(xb, "xb")
    index = IndexFlat(int(rows.shape[-1]), metric)
    index._blocks = [matrix(rows, index.d, "xb")]  # stay on their device: only searched, and not kept
    return index.search(xq, k)


def write_index(index: IndexFlat | IndexIDMap, path: Any) -> None:
    """Write an index in faiss's own file format.

    Raises:
        InputError: the file cannot be written.
    """
    ids = index._ids if isinstance(index, IndexIDMap) else None
    flat = index.index if isinstance(index, IndexIDMap) else index
    faiss_files.write(path, flat._rows().numpy(), flat.metric_type, None if ids is None else ids.numpy())


def read_index(path: Any) -> IndexFlat | IndexIDMap:
    """Read a flat index or an id map over one, written by faiss or by `write_index`.

    Raises:
        InputError: no such file, torn, or another kind of index.
    """
    rows, metric, ids = faiss_files.read(path)
    index = IndexFlatL2(rows.shape[1]) if metric == METRIC_L2 else IndexFlatIP(rows.shape[1])
    if ids is None:
        index.add(rows)
        return index
    mapped = IndexIDMap(index)
    mapped.add_with_ids(rows, ids)
    return mapped


def index_cpu_to_gpu(resources: StandardGpuResources, device: int, index: Any, options: Any = None) -> Any:
    """Give the index itself: it is searched where the queries are."""
    return index


def index_gpu_to_cpu(index: Any) -> Any:
    """Give the index itself."""
    return index


def get_num_gpus() -> int:
    """Count the GPUs."""
    return torch.cuda.device_count()


def omp_set_num_threads(n: int) -> None:
    """Set the number of threads, torch's too: they are the same."""
    torch.set_num_threads(n)


def omp_get_max_threads() -> int:
    """Give the number of threads."""
    return torch.get_num_threads()
