"""cosine_map: features to an anomaly map in one step, one minus the best cosine, upsampled."""

from __future__ import annotations

import torch
from torch import Tensor

from dinofast.ops.cosine_max import OP as COSINE_MAX
from dinofast.ops.registry import Cost, Sample, define
from dinofast.ops.rows import check_rows, require, result_dtype, search_workspace
from dinofast.ops.upsample_blur import resample


def cosine_map(
    features: Tensor, prototypes: Tensor, size: tuple[int, int], mask: Tensor | None = None
) -> Tensor:
    """Map every patch to 1 − its best cosine similarity, then upsample bilinearly.

    On a GPU it reads tables of weights from a cache: record it in a CUDA graph inside `dinofast.ops.keeping`.

    Args:
        features: (B, h, w, D), float32, bfloat16, float16 or float64.
        prototypes: (K, D), K >= 1, same dtype and device; both are normalized inside.
        size: (H, W) of the map in pixels, each at least 1.
        mask: (B, h, w) bool, True where a patch is scored; elsewhere its distance is 0 before the
            interpolation. None scores all.

    Returns:
        (B, H, W), in [0, 2], float32 (float64 for float64 arguments); bilinear with `align_corners=False`.
        A zero patch is at distance 1; a NaN patch makes NaN of the pixels that it has a weight in, and of no
        others.

    Raises:
        RuntimeError: wrong dimensions, D or dtype or device differ, no prototypes, a mask of other shape or
            not bool, a size below 1.

    >>> cosine_map(torch.ones(1, 2, 2, 3), torch.ones(1, 3), (4, 4)).shape
    torch.Size([1, 4, 4])
    """
    result: Tensor = torch.ops.dinofast.cosine_map.default(features, prototypes, list(size), mask)
    return result


def _reference(features: Tensor, prototypes: Tensor, size: list[int], mask: Tensor | None) -> Tensor:
    _fake(features, prototypes, size, mask)
    rows = features.reshape(-1, features.shape[3])
    similarity: Tensor = COSINE_MAX.reference(rows, prototypes)[0]
    distance = 1 - similarity.view(features.shape[:3])
    if mask is not None:
        distance = torch.where(mask, distance, 0)
    return resample(distance, size, 0.0, "bilinear", "reflect")


def _fake(features: Tensor, prototypes: Tensor, size: list[int], mask: Tensor | None) -> Tensor:
    require(
        features.dim() == 4, lambda: f"cosine_map: features must be (B, h, w, D), got {tuple(features.shape)}"
    )
    b, h, w, d = features.shape
    check_rows("cosine_map", features=features.new_empty(0, d), prototypes=prototypes)
    require(h > 0 and w > 0, lambda: f"cosine_map: the patch grid is empty, {h} × {w}")
    require(
        len(size) == 2 and size[0] >= 1 and size[1] >= 1,
        lambda: f"cosine_map: size must be (H, W), each at least 1, got {tuple(size)}",
    )
    if mask is not None:
        require(mask.dtype == torch.bool, lambda: f"cosine_map: mask must be bool, got {mask.dtype}")
        require(
            mask.shape == (b, h, w), lambda: f"cosine_map: mask is {tuple(mask.shape)}, the grid {(b, h, w)}"
        )
        require(
            mask.device == features.device,
            lambda: f"cosine_map: device differs, features {features.device} and mask {mask.device}",
        )
    return features.new_empty((b, size[0], size[1]), dtype=result_dtype(features))


def _samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    broken = draw(2, 5, 6, 33)
    broken[1, 2, 3, 4] = torch.nan
    broken[0, 1, 1] = 0
    mask = torch.rand(2, 5, 6, generator=generator) > 0.4
    return [
        Sample("empty batch", (draw(0, 4, 4, 8), draw(3, 8), [7, 9], None)),
        Sample("one patch", (draw(1, 1, 1, 8), draw(1, 8), [5, 3], None)),
        Sample("up 5x6 to 33x130", (draw(2, 5, 6, 33), draw(7, 33), [33, 130], None)),
        Sample("same size", (draw(2, 5, 6, 33), draw(7, 33), [5, 6], None)),
        Sample("down 9x11 to 4x5", (draw(1, 9, 11, 33), draw(130, 33), [4, 5], None)),
        Sample("masked", (draw(2, 5, 6, 33), draw(7, 33), [20, 18], mask)),
        Sample("NaN and zero patches", (broken, draw(7, 33), [20, 18], None)),
        Sample("NaN masked out", (broken, draw(7, 33), [20, 18], broken.isfinite().all(3))),
        Sample("strided", (draw(2, 6, 5, 40).transpose(1, 2)[..., 7:], draw(14, 33)[::2], [15, 18], None)),
        Sample("32x32 to 112x112", (draw(1, 32, 32, 64), draw(150, 64), [112, 112], None)),
    ]


def _cost(features: Tensor, prototypes: Tensor, size: list[int], mask: Tensor | None) -> Cost:
    n, d = features.numel() // features.shape[3], features.shape[3]
    pixels = features.shape[0] * size[0] * size[1]
    moved = (n + prototypes.shape[0]) * d * features.element_size() + 4 * pixels
    return Cost(bytes=moved, flops=2 * n * prototypes.shape[0] * d + 8 * pixels)


def _workspace(
    device: str, features: Tensor, prototypes: Tensor, size: list[int], mask: Tensor | None
) -> int:
    n = features.shape[:3].numel()
    return 12 * n + search_workspace(device, n, *prototypes.shape)


OP = define(
    "cosine_map(Tensor features, Tensor prototypes, int[] size, Tensor? mask) -> Tensor",
    reference=_reference,
    fake=_fake,
    samples=_samples,
    cost=_cost,
    inputs=(0, 1),
    differentiable=True,
    workspace=_workspace,
)
