"""Foreground masks without labels: the first principal component of an image's patches, or its gray."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from dinofast.errors import InputError
from dinofast.types import Features

MORPHOLOGIES = ("1d", "2d")
RULES = ("intensity", "pca", "otsu", "none")


def foreground_by(
    rule: str, features: Features, intensity_threshold: float, mask_threshold: float | None
) -> Tensor | None:
    """Find the patches that show the object, by a rule of this name.

    Args:
        rule: "intensity": mean gray above `intensity_threshold`. "otsu": mean gray above the image's own
            threshold, `otsu_mask`. "pca": `foreground_mask` of the features, closed on the grid. "none": all.
        features: checked features; for the first two rules with an `intensity` that `check_intensity` takes.
        intensity_threshold: in [0, 1).
        mask_threshold: of "pca".

    Returns:
        (B, h, w) bool, True on the foreground; None for "none".

    Raises:
        InputError: intensity or `mask_threshold` is missing.
    """
    if rule == "none":
        return None
    if rule == "pca":
        if mask_threshold is None:
            raise InputError(
                "foreground='pca' needs mask_threshold, in the units of the backbone's tokens: 10.0 for "
                "DINOv2's last block, which a Detector fills in; find a value of your own for any other."
            )
        return foreground_mask(features.tensor, mask_threshold, "2d")
    gray = _intensity(rule, features).to(features.tensor.device)
    return otsu_mask(gray) if rule == "otsu" else gray > intensity_threshold


def check_intensity(rule: str, features: Features) -> None:
    """Hold `Features.intensity` to what a rule needs.

    Raises:
        InputError: it is missing, or not (B, h, w) in [0, 1].
    """
    gray, grid = _intensity(rule, features), tuple(features.tensor.shape[:3])
    if tuple(gray.shape) != grid or not bool(((gray >= 0) & (gray <= 1)).all()):
        raise InputError(f"intensity must be {grid} with values in [0, 1], got {tuple(gray.shape)}")


def _intensity(rule: str, features: Features) -> Tensor:
    if features.intensity is None:
        raise InputError(
            f"foreground={rule!r} needs Features.intensity, the mean gray of each patch, which a Detector "
            "fills in; give it, or choose foreground='pca' or 'none'."
        )
    return features.intensity


def foreground_mask(
    tokens: Tensor, threshold: float, morphology: str = "1d", border: float = 0.2, keep: float = 0.35
) -> Tensor:
    """Find the patches that show the object, image by image.

    Every patch is projected on the first principal component of its image's patches (centered, not
    normalized, in float64). A patch is foreground where the projection exceeds `threshold`; where that keeps
    at most the share `keep` of the central window, the component points at the background, and the patches
    below −`threshold` are taken instead. A 3 × 3 dilation and a 3 × 3 closing follow.

    The component comes from an eigendecomposition without randomness; its sign makes the loading of largest
    magnitude positive, as scikit-learn's does. Time is dominated by that of one D × D matrix an image.

    Args:
        tokens: patch features (B, h, w, D), finite, floating point, any device; not normalized.
        threshold: least projection of a foreground patch, at least 0, in the units of the tokens. The
            published 10 belongs to DINOv2's last layer after its final norm and to nothing else.
        morphology: "2d" dilates and closes on the patch grid. "1d" does so along the raster order, across
            row ends, which is what the published code computes.
        border: the central window leaves out this share at each side: rows floor(border · h) to
            floor((1 − border) · h), columns likewise; in [0, 0.5).
        keep: share of the central window, in [0, 1].

    Returns:
        (B, h, w) bool, True on the foreground. Patches beyond the edge of the grid count neither for the
        dilation nor for the erosion. An image whose patches are all equal has no foreground.

    Raises:
        InputError: NaN or infinite tokens, wrong dimensions, an empty grid, or an argument out of range.

    References:
        Damm et al., "AnomalyDINO: boosting patch-based few-shot anomaly detection with DINOv2", WACV 2025,
        arXiv 2405.14529.

    >>> tokens = torch.zeros(1, 5, 5, 2)
    >>> tokens[0, 1:4, 1:4, 0] = 50.0
    >>> int(foreground_mask(tokens, threshold=10.0, morphology="2d").sum())
    25
    """
    if tokens.dim() != 4 or 0 in tokens.shape[1:] or not tokens.is_floating_point():
        raise InputError(
            f"foreground_mask: tokens must be floating point (B, h, w, D) with patches and channels, got "
            f"{tokens.dtype} {tuple(tokens.shape)}"
        )
    if not 0 <= threshold < math.inf:
        raise InputError(f"foreground_mask: threshold must be finite and at least 0, got {threshold}")
    if morphology not in MORPHOLOGIES:
        raise InputError(
            f"foreground_mask: unknown morphology {morphology!r}; one of {', '.join(MORPHOLOGIES)}"
        )
    if not (0 <= border < 0.5 and 0 <= keep <= 1):
        raise InputError(
            f"foreground_mask: border must lie in [0, 0.5) and keep in [0, 1], got {border} and {keep}"
        )
    bad = int((~tokens.isfinite().all(dim=3)).sum())
    if bad:
        raise InputError(
            f"foreground_mask: {bad} patches hold NaN or infinite tokens; look for NaN in the images"
        )
    b, h, w, _ = tokens.shape
    projection = torch.zeros(b, h, w, dtype=torch.float64, device=tokens.device)
    for image in range(b):
        projection[image] = _first_component(tokens[image].flatten(0, 1).double()).view(h, w)
    mask = projection > threshold
    top, bottom, left, right = (int(share * side) for side in (h, w) for share in (border, 1 - border))
    window = mask[:, top:bottom, left:right]
    inverted = window.sum(dim=(1, 2)).double() <= keep * (window.shape[1] * window.shape[2])
    mask = torch.where(inverted[:, None, None], -projection > threshold, mask)
    grid = (b, 1, h * w, 1) if morphology == "1d" else (b, 1, h, w)
    dilated = _dilate(mask.view(grid).float())
    closed = -_dilate(-_dilate(dilated))
    return closed.view(b, h, w) > 0


def otsu_mask(values: Tensor) -> Tensor:
    """Find the bright part of every image by the threshold that separates it best.

    Of all splits of an image's values into low and high ones, the one with the largest variance between the
    two parts is taken, w₀ · w₁ · (m₁ − m₀)² for parts of the shares w and the means m; the lowest threshold
    among equally good ones. No histogram is made: every value is a possible threshold.

    Args:
        values: (B, h, w), finite, floating point, any device.

    Returns:
        (B, h, w) bool, True where a value belongs to the high part. An image of one value has none.

    References:
        Otsu, "A threshold selection method from gray-level histograms", IEEE Transactions on Systems, Man,
        and Cybernetics 9, 1979.

    >>> otsu_mask(torch.tensor([[[0.0, 0.1, 0.8, 0.9]]])).tolist()
    [[[False, False, True, True]]]
    """
    flat = values.flatten(1).double().sort(dim=1).values
    n = flat.shape[1]
    low = torch.arange(1, n, device=flat.device)
    total = flat.cumsum(dim=1)
    gap = (total[:, -1:] - total[:, :-1]) / (n - low) - total[:, :-1] / low
    between = low * (n - low) * gap.square()
    between = torch.where(flat[:, 1:] > flat[:, :-1], between, -1.0)  # equal values stay together
    best = torch.cat([between, between.new_full((len(flat), 1), -0.5)], dim=1).argmax(dim=1, keepdim=True)
    threshold = flat.gather(1, best)
    return values.double() > threshold[:, :, None]


def _first_component(rows: Tensor) -> Tensor:
    """Project centered rows (N, D) on their first principal component; gives (N,)."""
    centered = rows - rows.mean(dim=0)
    direction = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -1]
    sign = direction[direction.abs().argmax()].sign()
    projection: Tensor = centered @ (direction * sign)
    return projection


def _dilate(image: Tensor) -> Tensor:
    """Take the largest of the 3 × 3 neighborhood; beyond the edge lies −inf, which never wins."""
    largest: Tensor = max_pool2d(image, kernel_size=3, stride=1, padding=1)
    return largest
