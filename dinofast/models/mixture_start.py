"""Where a mixture starts: means, sticks and a variance from some rows."""

from __future__ import annotations

import torch
from torch import Tensor

from dinofast.models.mixture import Mixture, begin
from dinofast.ops import farthest_point

INITS = ("k-means++", "first-rows")
SAMPLE = 20
"""Rows a component that "k-means++" is given."""


def start(
    rows: Tensor,
    n_components: int,
    init: str,
    *,
    concentration: float,
    reg_covar: float,
    full: bool,
    seed: int,
) -> Mixture:
    """Start a mixture from some rows, with their variance in every component.

    Args:
        rows: (N, D), N >= 1, finite: the first batch for "first-rows", a sample of all for "k-means++".
        n_components: K.
        init: one of `INITS`.
        concentration: α, at least 1.
        reg_covar: added to the variance, at least 0.
        full: whether components have full covariances.
        seed: of the draws.
    """
    if init == "first-rows":
        means, sticks = first_rows(rows, n_components, concentration, seed)
    else:
        means, sticks = plus_plus(rows, n_components, seed)
    variance = rows.double().var(0, correction=min(1, len(rows) - 1)) + reg_covar
    return begin(means, variance, sticks, concentration, full=full)


def plus_plus(rows: Tensor, n_components: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw rows as means, each with a probability that grows with its squared distance to those before.

    Components come in the order of their shares of the rows, the largest first, and their weights are these
    shares. Where fewer than K rows differ, the last components start empty: with the mean of the rows and
    the weight 0, which they keep.

    Args:
        rows: (N, D), N >= 1, finite.
        n_components: K.
        seed: of the draws.

    Returns:
        means (K, D) in the dtype of the rows and sticks (K,), float64.

    References:
        Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007.
    """
    draws = torch.rand(n_components, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gap = torch.full((len(rows),), torch.inf, dtype=rows.dtype, device=rows.device)
    owner = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    seeds: list[Tensor] = []
    for k, draw in enumerate(draws.to(rows.device)):
        odds = torch.ones_like(gap) if k == 0 else gap / gap.max()
        total = odds.double().square().cumsum(0)
        if not bool(total[-1] > 0):
            break
        chosen = torch.searchsorted(total, draw * total[-1], right=True).clamp_max(len(rows) - 1)
        nearer, _ = farthest_point(rows, gap, chosen)
        owner = torch.where(nearer < gap, k, owner)
        gap = nearer
        seeds.append(rows[chosen])
    count = torch.bincount(owner, minlength=n_components).double()
    means = rows.mean(0).repeat(n_components, 1)
    means[: len(seeds)] = torch.stack(seeds)
    count, order = count.sort(descending=True, stable=True)
    left = count.flip(0).cumsum(0).flip(0)
    return means[order], count / left.clamp_min(1)


def first_rows(rows: Tensor, n_components: int, concentration: float, seed: int) -> tuple[Tensor, Tensor]:
    """Take the first rows as means, in random order, and draw the sticks, as the published code does.

    Args:
        rows: (N, D), N >= 1, of the first batch. Means that they do not suffice for are drawn from N(0, I).
        n_components: K.
        concentration: α: sticks are drawn from Beta(1, α), but the last is 1.
        seed: of the draws.

    Returns:
        means (K, D) in the dtype of the rows and sticks (K,), float64.
    """
    generator = torch.Generator().manual_seed(seed)
    head = rows[:n_components]
    means = torch.randn(n_components, rows.shape[1], generator=generator).to(rows)
    means[: len(head)] = head[torch.randperm(len(head), generator=generator).to(rows.device)]
    draws = 1 - torch.rand(n_components, generator=generator, dtype=torch.float64)
    sticks = 1 - draws ** (1 / concentration)
    sticks[-1] = 1
    return means, sticks.to(rows.device)
