"""From patch scores to one number an image."""

from __future__ import annotations

from torch import Tensor


def top_percent(patches: Tensor) -> Tensor:
    """Average the largest percent of an image's patch scores, the largest alone where there are few.

    Args:
        patches: (B, h, w), floating point; T = floor(P / 100) of an image's P patches count, at least 1.

    Returns:
        (B,), same dtype.

    >>> import torch
    >>> top_percent(torch.arange(400.0).view(1, 20, 20)).tolist()
    [397.5]
    """
    flat = patches.flatten(1)
    mean: Tensor = flat.topk(max(flat.shape[1] // 100, 1), dim=1).values.mean(dim=1)
    return mean
