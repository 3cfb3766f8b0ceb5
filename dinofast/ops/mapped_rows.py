"""Rows that stay in a file: searched block after block, and let go again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dinofast.errors import InputError
from dinofast.ops.knn_topk import knn_rows
from dinofast.ops.rows import require, result_dtype

if TYPE_CHECKING:
    import numpy as np

STREAMED = 1 << 24  # elements that are searched at a time


class MappedRows:
    """View the rows of a memory map as a tensor, and search them.

    Args:
        rows: a `numpy.memmap` (M, D) of float32, M, D >= 1, with strides that are not negative.

    Attributes:
        tensor: the rows (M, D), float32; reading it reads the file.

    Raises:
        InputError: anything else.
    """

    def __init__(self, rows: np.memmap[tuple[int, int], np.dtype[np.float32]]) -> None:
        self.tensor = _view(rows)
        self._let_go = _letting_go(rows)
        owner, last = _base(rows), rows[-1:, -1:]
        self._path = None if rows.filename is None else Path(rows.filename)
        self._file = None if self._path is None else self._path.stat().st_ino
        self._needed = owner.offset + last.ctypes.data - owner.ctypes.data + rows.itemsize

    def next_block(self) -> None:
        """Let go of what was read, and make sure that the file still holds what will be.

        Raises:
            InputError: the file was cut since it was opened. Reading on would end the process.
        """
        self._let_go()
        if self._path is None:
            return
        try:
            found = self._path.stat()
        except FileNotFoundError:  # a file that was removed or replaced is kept as long as it is mapped
            return
        if found.st_ino == self._file and found.st_size < self._needed:
            raise InputError(
                f"{self._path}: was cut to {found.st_size} bytes while a bank searches it, "
                f"which needs {self._needed}; write the file anew and open the bank again."
            )

    def search(self, queries: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
        """Answer `knn_topk` for queries (Q, D) of any floating dtype, k <= M.

        Raises:
            InputError: see `next_block`.
            RuntimeError: queries are not floating point, or not as `knn_topk` says.
        """
        found = search_blocks(queries, self.tensor, k, metric, self.next_block)
        self._let_go()
        return found


def search_blocks(
    queries: Tensor, rows: Tensor, k: int, metric: str, between: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor]:
    """Answer `knn_topk` block after block of rows (M, D), k <= M, on the device of the queries (Q, D).

    Args:
        queries: of any floating dtype; float64 has the rows compared in float64.
        rows: of any floating dtype, anywhere.
        k: as for `knn_topk`.
        metric: as for `knn_topk`.
        between: is called before each block.

    Raises:
        RuntimeError: queries are not floating point, or not as `knn_topk` says.
    """
    kind = queries.dtype
    require(queries.is_floating_point(), lambda: f"knn_topk: queries must be floating point, got {kind}")
    dtype = result_dtype(queries)
    found: tuple[Tensor, Tensor] | None = None
    step = max(k, STREAMED // rows.shape[1])
    for start in range(0, max(len(rows) - k, 0) + 1, step):
        between()
        last = start + step > len(rows) - k
        block = rows[start:] if last else rows[start : start + step]
        distance, index = knn_rows(queries.to(dtype), block.to(queries.device, dtype), k, metric)
        index += start
        if found:  # equal distances of earlier blocks stay first
            distance, order = torch.cat([found[0], distance], 1).sort(dim=1, stable=True)
            index = torch.cat([found[1], index], 1).gather(1, order)
        found = distance[:, :k].contiguous(), index[:, :k].contiguous()
    assert found is not None
    return found


def _view(rows: np.memmap[tuple[int, int], np.dtype[np.float32]]) -> Tensor:
    import warnings

    import numpy as np

    if not isinstance(rows, np.memmap) or rows.ndim != 2 or rows.dtype != np.float32 or 0 in rows.shape:
        what = f"{getattr(rows, 'dtype', '')} {getattr(rows, 'shape', '')}"
        raise InputError(
            f"Bank: rows must be a tensor or a float32 memory map (M, D), got {type(rows).__name__} {what}"
        )
    if min(rows.strides) < 0 or any(stride % rows.itemsize for stride in rows.strides):
        raise InputError(
            f"Bank: a memory map must have its rows in the order of the file, got strides {rows.strides}; "
            "open it without reversing it"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it
        return torch.from_numpy(rows)


def _base(rows: np.memmap[tuple[int, int], np.dtype[np.float32]]) -> Any:
    """Give the array that lies on the map itself."""
    import numpy as np

    owner: Any = rows
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return owner


def _letting_go(rows: np.memmap[tuple[int, int], np.dtype[np.float32]]) -> Callable[[], None]:
    """Give what takes the file's pages out of memory, where they can be read again."""
    import mmap

    pages = _base(rows).base
    if rows.mode != "r" or not isinstance(pages, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return lambda: None
    return lambda: pages.madvise(mmap.MADV_DONTNEED)
