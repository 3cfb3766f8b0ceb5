"""upsample_blur: a patch map to pixels, interpolated and smoothed, as two small matrix products.

Interpolation and Gaussian are linear and separable, so the whole is A·S·Bᵀ: A (H, h) and B (W, w) hold
interpolation, boundary rule and blur together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinofast.ops.registry import Cost, Sample, define, kept
from dinofast.ops.rows import require, result_dtype

MODES = ("bilinear", "nearest")
BOUNDARIES = ("reflect", "mirror")


def upsample_blur(
    map: Tensor,
    size: tuple[int, int],
    sigma: float = 4.0,
    mode: str = "bilinear",
    boundary: str = "reflect",
) -> Tensor:
    """Resize patch maps to pixels, then blur them with a Gaussian truncated at 4 sigma.

    On a GPU it reads tables of weights from a cache: record it in a CUDA graph inside `dinofast.ops.keeping`.

    Args:
        map: (B, h, w), float32, bfloat16, float16 or float64.
        size: (H, W) in pixels, each at least 1.
        sigma: standard deviation in pixels of the result; 0 does not blur.
        mode: "bilinear" (`align_corners=False`, no antialias) or "nearest".
        boundary: how the blur sees beyond the edge: "reflect" repeats the edge pixel (d c b a | a b c d, as
            scipy.ndimage), "mirror" does not (d c b | a b c d, as torch's reflection padding).

    Returns:
        (B, H, W), float32 (float64 for float64 maps), a new tensor even where nothing changes. A NaN patch
        makes NaN of the pixels that it has a weight in, and of no others; an infinite one makes them
        infinite.

    Raises:
        RuntimeError: wrong dimensions or dtype, an empty grid, size below 1, negative or non-finite sigma,
            unknown mode or boundary.

    >>> upsample_blur(torch.ones(1, 2, 2), (8, 8), sigma=1.0).sub(1).abs().max().item() < 1e-6
    True
    """
    result: Tensor = torch.ops.dinofast.upsample_blur.default(map, list(size), float(sigma), mode, boundary)
    return result


@lru_cache(maxsize=64)
def resample_matrix(source: int, target: int, sigma: float, mode: str, boundary: str) -> NDArray[np.float64]:
    """Build the (target, source) matrix of interpolation followed by blur along one axis.

    Args:
        source: patches along the axis.
        target: pixels along the axis.
        sigma: see `upsample_blur`.
        mode: see `upsample_blur`.
        boundary: see `upsample_blur`.

    Returns:
        (target, source); every row sums to 1. A weight is zero only where it is exactly so.
    """
    pixels = np.arange(target)
    matrix = np.zeros((target, source))
    if mode == "nearest":
        matrix[pixels, pixels * source // target] = 1
    else:  # in whole numbers, so that a weight of zero is exactly zero
        place = np.clip((2 * pixels + 1) * source - target, 0, 2 * target * (source - 1))
        low, rest = np.divmod(place, 2 * target)
        matrix[pixels, low] = 1 - rest / (2 * target)
        matrix[pixels, np.minimum(low + 1, source - 1)] += rest / (2 * target)
    if sigma > 0:
        radius = int(4 * sigma + 0.5)
        offsets = np.arange(-radius, radius + 1)
        weights = np.exp(-0.5 * (offsets / sigma) ** 2)
        weights /= weights.sum()
        sharp, matrix = matrix, np.zeros_like(matrix)
        for offset, weight in zip(offsets, weights, strict=True):
            matrix += weight * sharp[_fold(pixels + offset, target, boundary)]
    return matrix


@dataclass(frozen=True)
class Weights:
    """The non-zero entries of a matrix, as native kernels take them.

    Attributes:
        count: rows of the matrix.
        start: (count + 1,) int32: the entries of row i are start[i] to start[i + 1].
        index: (entries,) int32: column of each, ascending within a row.
        weight: (entries,) float32.
    """

    count: int
    start: Tensor
    index: Tensor
    weight: Tensor


@lru_cache(maxsize=64)
def resample_weights(
    source: int, target: int, sigma: float, mode: str, boundary: str
) -> tuple[Weights, Weights]:
    """Give the entries of `resample_matrix`, by pixel and by patch; the pixels of a patch are contiguous."""
    matrix = resample_matrix(source, target, sigma, mode, boundary)
    return _entries(matrix), _entries(matrix.T)


def _entries(matrix: NDArray[np.float64]) -> Weights:
    row, column = matrix.nonzero()
    start = np.searchsorted(row, np.arange(matrix.shape[0] + 1))
    return Weights(
        count=matrix.shape[0],
        start=torch.from_numpy(start.astype(np.int32)),
        index=torch.from_numpy(column.astype(np.int32)),
        weight=torch.from_numpy(matrix[row, column].astype(np.float32)),
    )


def _fold(place: NDArray[np.int64], length: int, boundary: str) -> NDArray[np.int64]:
    """Bring positions beyond the edge back inside, any number of times."""
    if length == 1:
        return np.zeros_like(place)
    if boundary == "reflect":
        place = place % (2 * length)
        return np.where(place < length, place, 2 * length - 1 - place)
    place = place % (2 * length - 2)
    return np.where(place < length, place, 2 * length - 2 - place)


def resample(map: Tensor, size: Sequence[int], sigma: float, mode: str, boundary: str) -> Tensor:
    """Compute A·S·Bᵀ by its definition: see `upsample_blur`.

    Where a weight is zero nothing passes, not even NaN or inf, as a plain product would let through.

    Args:
        map: (B, h, w), float32 or float64.
        size: see `upsample_blur`.
        sigma: see `upsample_blur`.
        mode: see `upsample_blur`.
        boundary: see `upsample_blur`.

    Returns:
        (B, H, W), of the dtype of `map`; differentiable.
    """
    # what a tracer makes is its own: not for the cache, nor from it
    make = _placed if type(map) is Tensor else _placed.__wrapped__
    rows, columns = (
        kept(make(int(source), int(target), sigma, mode, boundary, map.dtype, map.device))
        for source, target in zip(map.shape[1:], size, strict=True)
    )
    pixels = rows @ torch.where(map.isfinite(), map, 0) @ columns.T
    touches_rows, touches_columns = (rows != 0).to(map.dtype), (columns != 0).to(map.dtype)
    for infinity in (torch.inf, -torch.inf):  # NaN counts as both: their sum
        broken = (map.isnan() | (map == infinity)).to(map.dtype)
        pixels = pixels + torch.where(touches_rows @ broken @ touches_columns.T > 0, infinity, 0)
    return pixels


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what a gradient needs must be no tensor of inference
def _placed(
    source: int, target: int, sigma: float, mode: str, boundary: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Give `resample_matrix` on a device; it is read only."""
    return torch.tensor(resample_matrix(source, target, sigma, mode, boundary), dtype=dtype, device=device)


def _reference(map: Tensor, size: list[int], sigma: float, mode: str, boundary: str) -> Tensor:
    _fake(map, size, sigma, mode, boundary)
    return resample(map.to(result_dtype(map)), size, sigma, mode, boundary)


def _fake(map: Tensor, size: list[int], sigma: float, mode: str, boundary: str) -> Tensor:
    if not (  # the checks below, in a tenth of the time; not for traced sizes, which `require` must see
        type(map) is Tensor
        and map.dim() == 3
        and map.is_floating_point()
        and 0 not in map.shape[1:]
        and len(size) == 2
        and min(size) >= 1
        and 0 <= sigma < math.inf
        and mode in MODES
        and boundary in BOUNDARIES
    ):
        _check(map, size, sigma, mode, boundary)
    return map.new_empty((map.shape[0], size[0], size[1]), dtype=result_dtype(map))


def _check(map: Tensor, size: list[int], sigma: float, mode: str, boundary: str) -> None:
    require(map.dim() == 3, lambda: f"upsample_blur: map must be (B, h, w), got {tuple(map.shape)}")
    require(map.is_floating_point(), lambda: f"upsample_blur: map must be floating point, got {map.dtype}")
    require(
        map.shape[1] > 0 and map.shape[2] > 0,
        lambda: f"upsample_blur: the patch grid is empty, {map.shape[1]} × {map.shape[2]}",
    )
    require(
        len(size) == 2 and size[0] >= 1 and size[1] >= 1,
        lambda: f"upsample_blur: size must be (H, W), each at least 1, got {tuple(size)}",
    )
    require(0 <= sigma < float("inf"), lambda: f"upsample_blur: sigma must be finite and >= 0, got {sigma}")
    require(mode in MODES, lambda: f"upsample_blur: unknown mode {mode!r}; one of {', '.join(MODES)}")
    require(
        boundary in BOUNDARIES,
        lambda: f"upsample_blur: unknown boundary {boundary!r}; one of {', '.join(BOUNDARIES)}",
    )


def _samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found = [
        Sample("empty batch", (draw(0, 3, 3), [6, 6], 1.0, "bilinear", "reflect")),
        Sample("one pixel", (draw(1, 1, 1), [1, 1], 4.0, "bilinear", "reflect")),
        Sample("no blur", (draw(2, 5, 7), [33, 130], 0.0, "bilinear", "reflect")),
        Sample("no change", (draw(2, 5, 7), [5, 7], 0.0, "bilinear", "reflect")),
        Sample("blur wider than the map", (draw(1, 3, 2), [6, 5], 9.0, "bilinear", "mirror")),
        Sample("strided", (draw(2, 14, 10)[:, ::2, 1::2], [40, 33], 2.5, "bilinear", "reflect")),
        Sample("32x32 to 112x112", (draw(2, 32, 32), [112, 112], 4.0, "bilinear", "reflect")),
    ]
    variants = [(mode, boundary) for mode in MODES for boundary in BOUNDARIES]
    found += [Sample(f"{m} {b}", (draw(2, 5, 7), [34, 29], 1.3, m, b)) for m, b in variants]
    broken = draw(3, 9, 11)
    broken[0, 4, 5] = torch.nan
    broken[1, 0, 10], broken[1, 8, 0], broken[2, 2, 2] = torch.inf, -torch.inf, torch.inf
    broken[2, 2, 3], broken[2, 7, 7] = -torch.inf, torch.nan
    for height, width, sigma in ((63, 90, 1.0), (18, 22, 0.0), (9, 11, 0.0), (4, 5, 0.5), (27, 33, 30.0)):
        found += [
            Sample(
                f"NaN and inf to {height}x{width}, sigma {sigma}, {m}", (broken, [height, width], sigma, m, b)
            )
            for m, b in (("bilinear", "reflect"), ("nearest", "mirror"))
        ]
    return found


def _cost(map: Tensor, size: list[int], sigma: float, mode: str, boundary: str) -> Cost:
    b, h, w = map.shape
    products = 2 * b * min(size[0] * h * w + size[0] * w * size[1], size[1] * h * w + size[0] * h * size[1])
    return Cost(bytes=map.numel() * map.element_size() + 4 * b * size[0] * size[1], flops=products)


def _workspace(device: str, map: Tensor, size: list[int], sigma: float, mode: str, boundary: str) -> int:
    """Two maps of rows still to be combined on a CPU, all of them on a GPU."""
    return 4 * (2 if device == "cpu" else len(map)) * map.shape[1] * size[1]


OP = define(
    "upsample_blur(Tensor map, int[] size, float sigma, str mode, str boundary) -> Tensor",
    reference=_reference,
    fake=_fake,
    samples=_samples,
    cost=_cost,
    inputs=(0,),
    workspace=_workspace,
)
