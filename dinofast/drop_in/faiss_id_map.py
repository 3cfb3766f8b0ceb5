"""faiss's id map: a flat index whose rows carry numbers of your own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dinofast.drop_in.flat_search import matrix, row_numbers
from dinofast.errors import InputError
from dinofast.interop import like, on_callers_stream, to_tensor

if TYPE_CHECKING:
    from dinofast.drop_in.faiss import IndexFlat


@on_callers_stream
class IndexIDMap:
    """A flat index whose rows have numbers of your own.

    Args:
        index: an empty flat index.

    Raises:
        InputError: the index holds rows.
    """

    is_trained = True

    def __init__(self, index: IndexFlat) -> None:
        if index.ntotal:
            raise InputError(f"an id map wants an empty index, this one has {index.ntotal} rows; reset it")
        self.index, self._ids = index, torch.zeros(0, dtype=torch.int64)

    @property
    def d(self) -> int:
        """Channels D."""
        return self.index.d

    @property
    def ntotal(self) -> int:
        """Rows held."""
        return self.index.ntotal

    @property
    def metric_type(self) -> int:
        """Metric of the index."""
        return self.index.metric_type

    @property
    def id_map(self) -> Any:
        """Number of every row (M,), int64."""
        return self._ids.numpy()

    def add(self, x: Any) -> None:
        """Refuse rows without numbers.

        Raises:
            InputError: always; use `add_with_ids`.
        """
        raise InputError("an id map wants a number for every row; use add_with_ids")

    def add_with_ids(self, x: Any, ids: Any) -> None:
        """Append rows (N, D) with numbers (N,), int64; they may repeat.

        Raises:
            InputError: no matrix, another D, or not one number a row.
        """
        rows, numbers = matrix(x, self.d, "x"), row_numbers(ids)
        if numbers.shape != (len(rows),):
            raise InputError(f"{len(rows)} rows want as many numbers, got {tuple(numbers.shape)}")
        self.index.add(rows)
        self._ids = torch.cat([self._ids, numbers])

    def search(self, x: Any, k: int, **options: Any) -> tuple[Any, Any]:
        """Find neighbors as the index does, with your numbers; −1 stays −1."""
        distance, index = self.index.search(x, k, **options)
        rows = to_tensor(index)
        rows.copy_(
            torch.where(rows < 0, -1, self._ids.to(rows.device)[rows.clamp(min=0)] if self.ntotal else -1)
        )
        return distance, index

    def range_search(self, x: Any, thresh: float) -> tuple[Any, Any, Any]:
        """Find rows as the index does, with your numbers."""
        lims, distance, index = self.index.range_search(x, thresh)
        rows = to_tensor(index)
        return lims, distance, like(self._ids.to(rows.device)[rows], x)

    def remove_ids(self, ids: Any) -> int:
        """Take out every row with one of these numbers; gives how many."""
        gone = torch.isin(self._ids, row_numbers(ids))
        self._ids = self._ids[~gone]
        return self.index.remove_ids(gone.nonzero()[:, 0])

    def reset(self) -> None:
        """Drop all rows and numbers."""
        self.index.reset()
        self._ids = torch.zeros(0, dtype=torch.int64)
