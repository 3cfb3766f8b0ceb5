"""Whether groups pay for the rows of a Bank: measured on a few of them."""

from __future__ import annotations

import torch
from torch import Tensor

from dinofast.ops import providers
from dinofast.ops.knn_topk_bank import forms_of

WORTHWHILE = {True: 0.8, False: 0.2}
"""Cost relative to comparing all codes below which groups pay: with int8 hardware, without."""
DECISION = 20  # the cost of comparing two rows in float32 from memory, in comparisons of codes
ROUGH = 8  # that of comparing them in float32 all through
PRODUCT = 4  # that of a float32 product
HELD = 192  # rows that the automatic choice and the recall are measured on


def knn_bank(
    queries: Tensor, packed: list[Tensor], k: int, metric: str, probes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator on the tensors of a bank."""
    distance, index, visited = torch.ops.dinofast.knn_topk_bank.default(queries, packed, k, metric, probes)
    return distance, index, visited


def visited_share(visited: Tensor, m: int) -> float:
    """Give the share of M rows that queries were compared with, from the operator's counts."""
    return float(visited.double().mean(0).max()) / m


def grouped_search(packed: list[Tensor], metric: str) -> tuple[float, float]:
    """Search grouped rows for the nearest other row of `HELD` rows.

    Returns:
        The share of rows visited, and the cost relative to comparing all codes.
    """
    visited = knn_bank(held_rows(packed[0]), packed, 2, metric, 0)[2]
    forms = forms_of(packed)
    m, d = packed[0].shape
    outlines, rough, decided = (visited.double().mean(0) / m).tolist()
    channels, groups = forms["basis"].shape[1], len(forms["radius"])
    cost = outlines * channels / d + ROUGH * rough + DECISION * decided + PRODUCT * groups / m
    return visited_share(visited, m), float(cost)


def worthwhile(cost: float) -> bool:
    """Tell whether a search by groups of this cost pays on this machine."""
    return cost < WORTHWHILE[providers.has_int8()]


def held_rows(rows: Tensor) -> Tensor:
    """Take up to `HELD` rows, evenly."""
    return rows[:: max(1, rows.shape[0] // HELD)][:HELD]
