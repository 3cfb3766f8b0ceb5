"""Exact search by squared distance or inner product, with faiss's words for what is not there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinofast.errors import InputError
from dinofast.interop import to_tensor
from dinofast.ops import Bank, knn_topk
from dinofast.ops.bank import FEW

INNER_PRODUCT, L2 = 0, 1
FAR = float(np.finfo(np.float32).max)
BLOCK = 1 << 22
"""Elements of the largest temporary matrix."""
LIFT = 8
"""Channels that share a lift. In one it would be the largest value of its row by far, and a bank's int8 codes
of a row are as coarse as that."""


class FlatSearch:
    """Finite rows on one device; many become a `Bank` once half as many queries were asked: then it pays."""

    def __init__(self, rows: Tensor, metric: int) -> None:
        self.device, self._metric = rows.device, metric
        finite = rows.isfinite().all(dim=1)
        whole = bool(finite.all())
        self._numbers = None if whole else finite.nonzero()[:, 0]
        self._rows = rows if whole else rows[finite]
        searched, name = self._rows, "sqeuclidean"
        if metric == INNER_PRODUCT:
            searched, name = _with_lift(self._rows), "cosine"
        self._name, self._asked = name, 0
        self._bank: Tensor | Bank = searched

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Give (Q, k) distances or products, and row numbers; −1 where nothing is left."""
        far = FAR if self._metric == L2 else -FAR
        distance = queries.new_full((len(queries), k), far)
        index = torch.full((len(queries), k), -1, device=self.device)
        good = queries.isfinite().all(dim=1)
        found = min(k, len(self._rows))
        if not found or not bool(good.any()):
            return distance, index
        self._asked += len(queries)
        rows_there = len(self._rows)
        if isinstance(self._bank, Tensor) and rows_there >= FEW and 2 * self._asked > rows_there:
            self._bank = Bank(self._bank, self._name)
        if self._metric == L2:
            near, rows = knn_topk(queries[good], self._bank, found, self._name)
        else:
            near, rows = self._products(queries[good], found)
        distance[good, :found] = near
        index[good, :found] = rows if self._numbers is None else self._numbers[rows]
        return distance, index

    def _products(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Give the k largest inner products: nearest in angle among lifted rows, then computed directly."""
        lifted = torch.nn.functional.pad(queries, (0, LIFT))
        wanted = min(k + 8, len(self._rows))  # more, as rounding may reorder neighbors in rank
        rows = knn_topk(lifted, self._bank, wanted, self._name)[1]
        product = torch.empty(rows.shape, device=self.device)
        step = max(1, BLOCK // (wanted * queries.shape[1]))
        for start in range(0, len(queries), step):
            block = slice(start, start + step)
            product[block] = torch.einsum("qd,qkd->qk", queries[block], self._rows[rows[block]])
        rows, order = rows.sort(dim=1)
        product = product.gather(1, order)
        product, order = product.sort(dim=1, descending=True, stable=True)
        return product[:, :k], rows.gather(1, order)[:, :k]


def _with_lift(rows: Tensor) -> Tensor:
    """Add channels that give all rows one norm, so that the largest product is the smallest angle."""
    square = rows.double().square().sum(dim=1)
    lift = ((square.max() if len(rows) else square.sum()) - square) / LIFT
    return torch.cat([rows, lift.sqrt()[:, None].to(rows.dtype).expand(-1, LIFT)], dim=1)


def matrix(x: Any, d: int, name: str) -> Tensor:
    """View what a caller gave as float32 rows (N, d).

    Raises:
        InputError: no array, no matrix, or another D.
    """
    tensor = to_tensor(x, name)
    if tensor.dim() != 2 or tensor.shape[1] != d:
        raise InputError(f"{name} must be a matrix (N, {d}), got {tuple(tensor.shape)}")
    return tensor.detach().to(torch.float32)


def squared_distances(queries: Tensor, rows: Tensor) -> Tensor:
    """Give all squared distances (Q, M) of (Q, D) and (M, D) as sums of squares: exact for small integers."""
    found = queries.new_empty(len(queries), len(rows))
    step = max(1, BLOCK // max(1, queries.numel()))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        found[:, start : start + step] = (queries[:, None] - block).square().sum(dim=2)
    return found


def row_numbers(ids: Any) -> Tensor:
    """Give numbers that a caller gave, as an array or a list, as int64 on the host.

    Raises:
        InputError: no numbers.
    """
    if not any(hasattr(ids, name) for name in ("__dlpack__", "__cuda_array_interface__")):
        try:
            ids = np.asarray(ids)
        except ValueError as error:
            raise InputError(f"ids: no array of numbers ({error}); give a flat list") from error
    return to_tensor(ids, "ids").detach().cpu().long()
