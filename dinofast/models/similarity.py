"""How like prototypes patches are: one cosine for several prototypes, and its range over an image."""

from __future__ import annotations

import torch
from torch import Tensor

AGGREGATES = ("max", "mean")


def aggregated(unit: Tensor, centroids: Tensor, real: Tensor | None, aggregate: str) -> Tensor:
    """Compare rows with all centroids and make one cosine of each row's.

    Args:
        unit: (..., N, D), unit rows.
        centroids: (..., K, D), unit rows.
        real: bool, broadcasts to (..., N, K), False where a centroid is none; None where all are.
        aggregate: "max" or "mean".

    Returns:
        (..., N), in [-1, 1].
    """
    cosine = (unit @ centroids.mT).clamp(-1, 1)
    if aggregate == "max":
        return (cosine if real is None else cosine.masked_fill(~real, -torch.inf)).amax(dim=-1)
    if real is None:
        return cosine.mean(dim=-1)
    return cosine.masked_fill(~real, 0).sum(dim=-1) / real.sum(dim=-1)


def seen(mask: Tensor) -> Tensor:
    """Give the foreground (B, h, w) of a mask, all patches of an image where it has none."""
    return mask | ~mask.any(dim=(1, 2), keepdim=True)


def extremes(similarity: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give the least and the largest similarity (B, 1, 1) of what is `seen` of each image (B, h, w)."""
    low = high = similarity
    if mask is not None:
        low, high = (similarity.masked_fill(~seen(mask), end) for end in (torch.inf, -torch.inf))
    return low.amin(dim=(1, 2), keepdim=True), high.amax(dim=(1, 2), keepdim=True)
