"""Collecting rows of unknown number without holding them twice."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class RowStore:
    """A growing float32 matrix on the host, handed over without being held twice.

    Rows are collected in blocks of at most 64 MiB, and `gather` frees each block once it is copied. Blocks
    of that size go back to the system when freed; batch-sized ones would stay in the C heap.
    """

    _BLOCK = 1 << 26

    def __init__(self) -> None:
        self._blocks: deque[Tensor] = deque()
        self._count = 0
        self._free = 0

    def __len__(self) -> int:
        return self._count

    def append(self, rows: Tensor) -> None:
        """Add (n, D) rows of any floating dtype, from any device."""
        done = 0
        while done < rows.shape[0]:
            if self._free == 0:
                limit = max(1, self._BLOCK // (4 * rows.shape[1]))
                self._free = min(max(self._count, rows.shape[0]), limit)
                self._blocks.append(torch.empty(self._free, rows.shape[1]))
            n = min(self._free, rows.shape[0] - done)
            start = self._blocks[-1].shape[0] - self._free
            self._blocks[-1][start : start + n] = rows[done : done + n]
            self._free -= n
            self._count += n
            done += n

    def gather(self, device: torch.device | None) -> Tensor:
        """Give all rows (M, D) in one contiguous tensor; the rows are handed over, nothing is left here."""
        matrix = torch.empty(self._count, self._blocks[0].shape[1], device=device)
        start = 0
        while self._blocks:
            block = self._blocks.popleft()
            n = min(block.shape[0], self._count - start)
            matrix[start : start + n] = block[:n]
            start += n
        return matrix
