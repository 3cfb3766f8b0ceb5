"""Tokens as a model wants them."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import interpolate

from dinofast.ops.rows import normalize_rows


def prepared_tokens(tokens: Tensor, *, normalize: bool, resample: int | None) -> Tensor:
    """Normalize tokens, then bring their grid to another size.

    Args:
        tokens: (B, h, w, D), finite, floating point.
        normalize: scale each to unit L2 norm; a zero token stays zero. Tokens that are resampled afterwards
            are shorter.
        resample: side of the new grid, bilinear without antialiasing; None keeps the grid.

    Returns:
        (B, h, w, D) or (B, resample, resample, D), float32.
    """
    tokens = normalize_rows(tokens) if normalize else tokens.float()
    if resample is None or tokens.shape[1:3] == (resample, resample):
        return tokens
    planes = tokens.permute(0, 3, 1, 2)
    planes = interpolate(planes, (resample, resample), mode="bilinear", align_corners=False)
    return planes.permute(0, 2, 3, 1).contiguous()
