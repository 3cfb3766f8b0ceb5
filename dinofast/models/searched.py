"""Models that keep rows and search them: as they are, or prepared where that pays."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Any

from torch import Tensor

from dinofast.errors import InputError
from dinofast.models.base import Model
from dinofast.ops import Bank, providers
from dinofast.ops.bank import FEW
from dinofast.ops.bank_size import bank_bytes, building_bytes, groups_pay

_LOG = logging.getLogger("dinofast.models")


class SearchedModel(Model):
    """Base of models whose state holds the rows `bank` (M, D), which their queries are compared with.

    From 4096 rows on, the first search on the CPU prepares a `dinofast.ops.Bank` beside the rows, which later
    searches use until the rows change. It takes up to M · (D + 60) bytes more: codes, or outlines, what
    pads the groups of rows, and their centroids: `prepared_bytes`. It changes no bit of the results, and is
    neither copied nor saved. Rows that it cannot take are searched as they are, slower, which is logged once.
    Rows that were made under `torch.inference_mode` must not be changed in place: that goes unnoticed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._prepared: tuple[Tensor, int | None, Bank | None, str] | None = None

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

    @property
    @abstractmethod
    def _metric_searched(self) -> str:
        """The metric by which rows are searched."""

    def prepared_bytes(self, device: str) -> int:
        """Tell the bytes of a prepared bank beside the rows, from a sample of them; see `groups_pay`."""
        if device != "cpu":
            return 0
        try:
            grouped = groups_pay(self.bank, self._metric_searched)
        except InputError:  # no bank will be made of such rows
            return 0
        m, d = self.bank.shape
        return bank_bytes(m, d, self._metric_searched, grouped=grouped)["cpu"] - self.bank.nbytes

    def preparing_bytes(self, device: str) -> int:
        """Tell the most bytes that making the prepared bank takes beside the rows, the bank included."""
        return building_bytes(*self.bank.shape) if device == "cpu" else 0

    def _searched(self, metric: str) -> Tensor | Bank:
        """Give the rows for `knn_topk` by one metric, prepared where that pays."""
        rows = self.bank
        if not rows.is_cpu or len(rows) < FEW or providers.no_codes(rows.shape[1]):
            return rows
        version = None if rows.is_inference() else rows._version
        kept = self._prepared
        if kept is None or kept[0] is not rows or kept[1] != version or kept[3] != metric:
            self._prepared = kept = rows, version, self._bank(rows, metric), metric
        return rows if kept[2] is None else kept[2]

    def _bank(self, rows: Tensor, metric: str) -> Bank | None:
        try:
            return Bank(rows, metric, adopt=True)
        except InputError as error:  # a state from elsewhere, with rows that no fit gives
            _LOG.warning("%s is searched without a prepared bank, slower: %s", self.name, error)
            return None
