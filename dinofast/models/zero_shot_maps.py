"""What AD-DINOv3 computes: adapted tokens and texts, cross-modal maps, anomaly awareness, global logits.

L is the number of taps, C the number of classes, E the width of the text vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SLOPE = 0.01
TEXT_SCALE = 100.0
AWARE_SCALE = 10.0
_TINY = 1e-12


def standardized(tensor: Tensor) -> Tensor:
    """Standardize patch features per image and channel: minus the mean, by the unbiased deviation + 1e-6.

    Args:
        tensor: (B, h, w, D) with at least two patches; a channel without variation becomes 0.

    Returns:
        (B, h, w, D), float32.
    """
    rows = tensor.float().flatten(1, 2)
    rows = rows - rows.mean(dim=1, keepdim=True)
    # torch.std and vector_norm over this dimension take ten times as long on a CPU
    deviation = (rows.square().sum(dim=1, keepdim=True) / (rows.shape[1] - 1)).sqrt()
    return rows.div_(deviation + 1e-6).view(tensor.shape)


def adapted(tokens: Tensor, weights: Tensor) -> Tensor:
    """Apply each tap's adapter to its part of the channels: LeakyReLU(W x), all taps in one product.

    Args:
        tokens: (..., D) with D = L · d, tap by tap.
        weights: (L, E, d).

    Returns:
        (L, R, E) for R tokens, not normalized.
    """
    taps, _, width = weights.shape
    products = tokens.reshape(-1, taps, width).transpose(0, 1) @ weights.mT
    return F.leaky_relu(products, SLOPE, inplace=True)


def text_matrix(pairs: Tensor, weights: Tensor, interleaved: bool) -> Tensor:
    """Apply the two text adapters and assemble the matrix that features are compared with.

    Args:
        pairs: text vectors (C, 2, E), normal and abnormal.
        weights: (2, E, E).
        interleaved: write both adapted vectors one after the other and read the memory as E rows of 2, as
            the published code does: column 0 then holds the even positions of both, column 1 the odd ones.
            Otherwise column 0 is the normal, column 1 the abnormal vector.

    Returns:
        (C, E, 2), not normalized.
    """
    found = F.leaky_relu((weights @ pairs[..., None])[..., 0], SLOPE)
    return found.reshape(len(pairs), -1, 2) if interleaved else found.mT


def compared(tokens: Tensor, directions: Tensor) -> Tensor:
    """Compute token · direction / |token| without writing the normalized tokens.

    Args:
        tokens: adapted tokens (L, ..., E).
        directions: (..., E, k), as torch.matmul broadcasts it.

    Returns:
        (L, ..., k); 0 for a zero token.
    """
    length: Tensor = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    return tokens @ directions / length.clamp_min(_TINY)


def unit(tokens: Tensor) -> Tensor:
    """Normalize tokens (..., E) to unit length; a zero token stays zero."""
    return F.normalize(tokens, dim=-1, eps=_TINY)


def global_logits(cls: Tensor, matrix: Tensor) -> Tensor:
    """Compare class tokens with the text matrix, and average over the taps.

    Args:
        cls: adapted class tokens of unit length (L, B, E).
        matrix: (E, 2) for all images or (B, E, 2).

    Returns:
        (B, 2): normal and abnormal logit.
    """
    return TEXT_SCALE * (cls.mean(dim=0)[:, None] @ matrix)[:, 0]


def upsampled(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate bilinearly with aligned corners, as two small products: deterministic, backward too.

    Args:
        values: (..., h, w), float32 or float64.
        size: (H, W).

    Returns:
        (..., H, W).
    """
    rows, columns = (_weights(out, grid, values) for out, grid in zip(size, values.shape[-2:], strict=True))
    return rows @ values @ columns.T


def _weights(size: int, grid: int, like: Tensor) -> Tensor:
    """Give the matrix (size, grid) that interpolates `grid` values to `size`, the first and last kept."""
    step = (grid - 1) / max(size - 1, 1)
    position = torch.arange(size, dtype=torch.float64, device=like.device)[:, None] * step
    distance = position - torch.arange(grid, dtype=torch.float64, device=like.device)
    return (1 - distance.abs()).clamp_min(0).to(like.dtype)
