"""Models that keep rows and search them: as they are, or prepared where that pays."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dinofast.errors import InputError
from dinofast.models.base import Model
from dinofast.ops import Bank, providers
from dinofast.ops.bank import FEW


class SearchedModel(Model):
    """Base of models whose state holds the rows `bank` (M, D), which their queries are compared with.

    From 4096 rows on, the first search on the CPU prepares a `dinofast.ops.Bank` beside the rows, about
    1.6 · M · D bytes more, which later searches use until the rows change. It changes no bit of the results,
    and is neither copied nor saved.
    """

    def __init__(self) -> None:
        super().__init__()
        self._prepared: tuple[Tensor, int, Bank] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}

    def __setattr__(self, name: str, value: object) -> None:
        if name == "_state":
            self._prepared = None
        super().__setattr__(name, value)

    @property
    def bank(self) -> Tensor:
        """The learned rows (M, D), float32.

        Raises:
            InputError: the model is not fitted.
        """
        return self.state()["bank"]

    def _searched(self, metric: str) -> Tensor | Bank:
        """Give the rows for `knn_topk` by one metric, prepared where that pays."""
        rows = self.bank
        if not rows.is_cpu or len(rows) < FEW or providers.no_codes(rows.shape[1]):
            return rows
        kept = self._prepared
        if kept is None or kept[0] is not rows or kept[1] != rows._version or kept[2].metric != metric:
            try:
                bank = Bank(rows, metric, adopt=True)
            except InputError:  # a state from elsewhere, with rows that no fit gives
                return rows
            self._prepared = kept = rows, rows._version, bank
        return kept[2]
