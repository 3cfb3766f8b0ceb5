"""Tokens as a model wants them."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import interpolate

from dinofast.errors import InputError
from dinofast.ops.rows import normalize_rows
from dinofast.types import Features


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


def class_tokens(features: Features) -> Tensor:
    """Give class tokens (B, E) on the device of the patches, for a model that matches images by them.

    Raises:
        InputError: there are none.
    """
    if features.cls is None:
        raise InputError(
            "match_descriptor='cls' needs class tokens, and these features have none (EfficientNet has "
            "none); choose match_descriptor='mean_patch' or 'mean_foreground_patch'."
        )
    return features.cls.to(features.tensor.device)


def check_class_tokens(features: Features) -> None:
    """Hold class tokens to what a model that matches images by them needs.

    Raises:
        InputError: there are none, not one row for each image, or NaN or infinite ones.
    """
    cls, b = class_tokens(features), len(features)
    if cls.dim() != 2 or cls.shape[0] != b:
        raise InputError(f"class tokens must be one row for each of {b} images, got {tuple(cls.shape)}")
    check_finite_cls(cls)


def check_finite_cls(cls: Tensor) -> None:
    """Refuse class tokens of any shape that hold NaN or infinity; waits for the device.

    Raises:
        InputError: NaN or infinite ones.
    """
    if not bool(cls.isfinite().all()):
        raise InputError("class tokens hold NaN or infinite values; look for NaN in the images.")
