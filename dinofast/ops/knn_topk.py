"""knn_topk: the k nearest bank rows of every query, exactly, without the (Q, M) matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dinofast.ops.registry import Cost, Sample, define
from dinofast.ops.rows import (
    BLOCK,
    check_rows,
    normalize_rows,
    require,
    result_dtype,
    row_samples,
    search_workspace,
)

if TYPE_CHECKING:
    from dinofast.ops.bank import Bank

METRICS = ("cosine", "euclidean", "sqeuclidean")


def knn_topk(
    queries: Tensor, bank: Tensor | Bank, k: int = 1, metric: str = "cosine"
) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows of a bank for every query, by exhaustive search.

    Memory beyond the arguments and the results is one tile, whatever Q and M.

    Args:
        queries: (Q, D), float32, bfloat16, float16 or float64.
        bank: (M, D), M >= k, same dtype and device; or a `Bank` on the same device, whatever the dtype.
        k: neighbors wanted, 1 <= k <= M.
        metric: "cosine" (1 − cosine, in [0, 2], rows normalized inside, a zero row is at distance 1 from
            everything), "euclidean", or "sqeuclidean" (the one squared distance); for these two, norms beyond
            1e18 leave the range of float32 and give inf or NaN. A `Bank` has its own, which must be this.

    Returns:
        distance: (Q, k), ascending, float32 (float64 for float64 arguments).
        index: (Q, k), int64, in [0, M); equal distances come in ascending order of index.
        A query with NaN or inf has NaN distances; a bank row with NaN or inf makes every distance NaN, so a
        broken bank never looks normal. Indices beside NaN are 0 .. k−1 and mean nothing.

    Raises:
        RuntimeError: not matrices, D, dtype or device differ, empty bank, k < 1, k > M, unknown metric, or
            not the bank's.

    >>> distance, index = knn_topk(torch.tensor([[1.0, 0.0]]), torch.eye(2), k=2)
    >>> distance.tolist(), index.tolist()
    ([[0.0, 1.0]], [[0, 1]])
    """
    if isinstance(bank, Tensor):
        return knn_rows(queries, bank, k, metric)
    if metric != bank.metric:
        raise RuntimeError(f"knn_topk: metric {metric!r}, but the bank was prepared for {bank.metric!r}")
    return bank.search(queries, k)


def knn_rows(queries: Tensor, bank: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Call the operator on plain rows."""
    distance, index = torch.ops.dinofast.knn_topk.default(queries, bank, k, metric)
    return distance, index


def _reference(queries: Tensor, bank: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    distance, index = _fake(queries, bank, k, metric)
    side = max(k, int(BLOCK**0.5))
    for start in range(0, queries.shape[0], side):
        block = slice(start, start + side)
        distance[block], index[block] = _search(queries[block], bank, k, metric, side)
    return distance, index


def _search(queries: Tensor, bank: Tensor, k: int, metric: str, side: int) -> tuple[Tensor, Tensor]:
    """Search one block of queries: an expanded product picks, the direct difference decides the order."""
    x = _prepare(queries, metric)
    best = x.new_full((x.shape[0], 0), 0)
    index = torch.empty_like(best, dtype=torch.int64)
    poisoned = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    for start in range(0, bank.shape[0], side):
        y = _prepare(bank[start : start + side], metric)
        ones = metric == "cosine"  # a zero row too: at distance 1 from everything
        d = (1 if ones else (y * y).sum(1)) - 2 * (x @ y.T) + (1 if ones else (x * x).sum(1, keepdim=True))
        poisoned |= d.isnan().any(dim=1)
        new = torch.arange(start, start + y.shape[0], device=x.device).expand(x.shape[0], -1)
        best, index = _smallest(torch.cat([best, d], 1), torch.cat([index, new], 1), k)
    distance = _direct(x, bank, index, metric)
    distance, index = _in_order(distance, index)
    distance = distance.masked_fill(poisoned[:, None], torch.nan)
    return distance, torch.where(poisoned[:, None], torch.arange(k, device=x.device), index)


def _prepare(rows: Tensor, metric: str) -> Tensor:
    rows = normalize_rows(rows) if metric == "cosine" else rows.to(result_dtype(rows))
    return torch.where(rows.isfinite().all(1, keepdim=True), rows, torch.nan)


def _smallest(distance: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Keep the k smallest of each row; among equals at the edge those of the smallest index."""
    if distance.shape[1] <= k:
        return distance, index
    values, columns = distance.topk(k, dim=1, largest=False)
    ambiguous = (distance <= values.amax(1, keepdim=True)).sum(1) > k
    if bool(ambiguous.any()):
        columns[ambiguous] = distance[ambiguous].sort(dim=1, stable=True).indices[:, :k]
    columns = columns.sort(
        dim=1
    ).values  # concatenation keeps indices ascending, so column order is index order
    return distance.gather(1, columns), index.gather(1, columns)


def _direct(x: Tensor, bank: Tensor, index: Tensor, metric: str) -> Tensor:
    """Give the distances of chosen pairs from Σ(x−y)², which does not cancel for near neighbors."""
    distance = x.new_empty(index.shape)
    step = max(1, BLOCK // (index.shape[1] * x.shape[1]))
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        y = _prepare(bank[index[rows].flatten()], metric).view(*index[rows].shape, -1)
        d = (x[rows, None] - y).square().sum(2)
        if metric == "euclidean":
            d = d.sqrt()
        elif metric == "cosine":  # |x−y|² = 2 − 2 cos for unit rows; a zero row has cosine 0 to everything
            unit = (x[rows, None] != 0).any(2) & (y != 0).any(2)
            d = torch.where(unit, d / 2, 1.0).clamp(0, 2)
        distance[rows] = d
    return distance


def _in_order(distance: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Sort by distance, then by index; index is ascending on entry, so a stable sort suffices."""
    distance, order = distance.sort(dim=1, stable=True)
    return distance, index.gather(1, order)


def _fake(queries: Tensor, bank: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    check_rows("knn_topk", queries=queries, bank=bank)
    require(k >= 1, lambda: f"knn_topk: k must be at least 1, got {k}")
    require(k <= bank.shape[0], lambda: f"knn_topk: k = {k} exceeds the bank's {bank.shape[0]} rows")
    require(metric in METRICS, lambda: f"knn_topk: unknown metric {metric!r}; one of {', '.join(METRICS)}")
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=result_dtype(queries)), queries.new_empty(shape, dtype=torch.int64)


def _verify(args: tuple[object, ...], results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    """Hold indices to their meaning: each names a row at the true distance of its rank, none twice."""
    queries, bank, _k, metric = args
    assert isinstance(queries, Tensor)
    assert isinstance(bank, Tensor)
    assert isinstance(metric, str)
    index = results[1]
    assert bool(((index >= 0) & (index < bank.shape[0])).all()), "index outside [0, M)"
    ordered = index.sort(dim=1).values
    assert not bool((ordered[:, 1:] == ordered[:, :-1]).any()), "a row is named twice"
    if index.shape[0] == 0:
        return
    reached = _direct(_prepare(queries.double(), metric), bank.double(), index, metric)
    finite = ~truth[0].isnan()
    eps = torch.finfo(queries.dtype).eps
    slack = 1e-6 + 8 * eps * (1 + truth[0].abs() + reached.abs())
    excess = ((reached - truth[0]).abs() - slack)[finite]
    assert excess.numel() == 0 or excess.max().item() <= 0, (
        f"a named row misses its rank's distance by {excess.max()}"
    )


def _cost(queries: Tensor, bank: Tensor, k: int, metric: str) -> Cost:
    (q, d), m = queries.shape, bank.shape[0]
    return Cost(bytes=(q + m) * d * queries.element_size() + q * k * 12, flops=2 * q * m * d)


def knn_workspace(device: str, queries: Tensor, m: int, k: int) -> int:
    """Give the most bytes that a search for k of m rows allocates for queries (Q, D).

    On a CPU the blocks of `search_workspace` and queries in tiles; on a GPU k keys for every query and part,
    65536 of them or as many as queries, and two factors a query.
    """
    q, d = queries.shape
    if device == "cpu":
        return search_workspace(device, q, m, d) + 8 * min(q * d, 1 << 21)
    return 16 * k * max(q, 1 << 16) + 8 * q


def _samples() -> list[Sample]:
    pairs = row_samples((9, 2100))
    found = [Sample(s.name, (*s.args, 1, "cosine")) for s in pairs]
    several = [s for s in pairs if s.args[1].shape[0] > 2]
    found += [Sample(f"{s.name}, k=2 cosine", (*s.args, 2, "cosine")) for s in several]
    for metric in ("euclidean", "sqeuclidean"):
        in_range = [s for s in several if "huge" not in s.name]
        found += [Sample(f"{s.name}, k=2 {metric}", (*s.args, 2, metric)) for s in in_range]
    wide = next(s for s in pairs if s.name == "9x2100x33")
    return [
        *found,
        Sample("k=64", (*wide.args, 64, "euclidean")),
        Sample("k=M", (*wide.args, 2100, "cosine")),
    ]


OP = define(
    "knn_topk(Tensor queries, Tensor bank, int k, str metric) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    samples=_samples,
    cost=_cost,
    inputs=(0, 1),
    verify=_verify,
    workspace=lambda device, x, y, k, _metric: knn_workspace(device, x, len(y), k),
)
