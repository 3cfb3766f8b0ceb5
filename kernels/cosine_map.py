"""cosine_map: one launch for a few images, each program scoring the patches that its pixels touch; else two.

Of the two, the first finds the best similarity of every patch, the second gathers the pixels.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dinofast.kernels import cosine_max, resample
from dinofast.kernels.resample import Axis
from dinofast.kernels.tile import (
    BROKEN,
    DTYPES,
    Variant,
    interpretable,
    keep_best,
    load_rows,
    peak_factor,
    unit_factor,
)
from torch import Tensor

ROWS, COLUMNS = 16, 32
DEPTH = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
MOST_PROTOTYPES = 1024
"""Beyond, the split search of cosine_max comes first: here one program compares all prototypes."""
PATCH_ROWS, PATCH_COLUMNS = 4, 8
"""Patches that a program of the single launch scores, neighbors share those at its edges."""
FUSED_COLUMNS, FUSED_DEPTH = 64, 64
FUSED_OPTIONS = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
ONE_WAVE = 132
"""Programs that run at once on the GPU in mind (H200). With more of them the patches scored twice cost more
than the second launch; no GPU has compared the two yet."""


@triton.jit
def best_similarity(
    features, prototypes, row, n, k, d, feature_stride, prototype_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Give the best similarity of ROWS features to all prototypes; both are normalized on the way."""
    x_factor = peak_factor(features, row, n, d, feature_stride, ROWS, DEPTH)
    value = tl.full((ROWS,), float("-inf"), tl.float32)
    index = tl.zeros((ROWS,), tl.int32)
    for start in range(0, k, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        y_factor = peak_factor(prototypes, column, k, d, prototype_stride, COLUMNS, DEPTH)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        x_squares = tl.zeros((ROWS,), tl.float32)
        y_squares = tl.zeros((COLUMNS,), tl.float32)
        for depth in range(0, d, DEPTH):
            channel = depth + tl.arange(0, DEPTH)
            x = load_rows(features, row, channel, n, d, feature_stride)
            y = load_rows(prototypes, column, channel, k, d, prototype_stride)
            x_scaled = x.to(tl.float32) * x_factor[:, None]
            y_scaled = y.to(tl.float32) * y_factor[:, None]
            x_squares += tl.sum(x_scaled * x_scaled, 1)
            y_squares += tl.sum(y_scaled * y_scaled, 1)
            product = tl.dot(
                x_scaled.to(x.dtype), tl.trans(y_scaled.to(y.dtype)), product, input_precision="ieee"
            )
        cosine = product * unit_factor(x_squares)[:, None] * unit_factor(y_squares)[None, :]
        cosine = tl.where((column < k)[None, :], cosine, float("-inf"))
        value, index = keep_best(value, index, cosine, column)
    unit = tl.minimum(tl.maximum(value, -1.0), 1.0)
    return tl.where(value == BROKEN, float("nan"), unit)


@triton.jit
def similarity(
    features, prototypes, values, n, k, d, feature_stride, prototype_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Find the best similarity of ROWS features to all prototypes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    found = best_similarity(
        features, prototypes, row, n, k, d, feature_stride, prototype_stride, ROWS, COLUMNS, DEPTH
    )
    tl.store(values + row, found, mask=row < n)


@triton.jit
def weights(table_index, table_weight, pixel, size, entries, PIXELS: tl.constexpr, PATCHES: tl.constexpr):
    """Give the first patch of a block of pixels, and the weights (PIXELS, PATCHES) from that patch on."""
    first = tl.full((PIXELS,), 0x7FFFFFFF, tl.int32)
    for i in range(entries):
        at = tl.load(table_index + pixel * entries + i, mask=pixel < size, other=-1)
        first = tl.minimum(first, tl.where(at >= 0, at, 0x7FFFFFFF))
    begin = tl.min(first, 0)
    patch = begin + tl.arange(0, PATCHES)
    table = tl.zeros((PIXELS, PATCHES), tl.float32)
    for i in range(entries):
        at = tl.load(table_index + pixel * entries + i, mask=pixel < size, other=-1)
        weight = tl.load(table_weight + pixel * entries + i, mask=pixel < size, other=0.0)
        table += tl.where(at[:, None] == patch[None, :], weight[:, None], 0.0)
    return begin, table


@triton.jit
def fused(
    features, prototypes, mask, row_index, row_weight, column_index, column_weight, pixels,
    n, h, w, k, d, feature_stride, prototype_stride, height, width, row_entries, column_entries,
    MASKED: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
    PATCH_ROWS: tl.constexpr, PATCH_COLUMNS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Fill a block of HIGH x WIDE pixels from the patches that it touches, scored here.

    The block is A S B', with S the distances of these patches and A, B the weights of its rows and columns. A
    patch without weight is never added, so its NaN goes nowhere.
    """
    across, down = tl.cdiv(width, WIDE), tl.cdiv(height, HIGH)
    tile = tl.program_id(0)
    column = tile % across * WIDE + tl.arange(0, WIDE)
    row = tile // across % down * HIGH + tl.arange(0, HIGH)
    image = tile // across // down
    top, of_rows = weights(row_index, row_weight, row, height, row_entries, HIGH, PATCH_ROWS)
    left, of_columns = weights(
        column_index, column_weight, column, width, column_entries, WIDE, PATCH_COLUMNS
    )
    patch = tl.arange(0, PATCH_ROWS * PATCH_COLUMNS)
    y, x = top + patch // PATCH_COLUMNS, left + patch % PATCH_COLUMNS
    there = (y < h) & (x < w)
    place = tl.where(there, (image * h + y) * w + x, n)
    value = 1 - best_similarity(
        features, prototypes, place, n, k, d, feature_stride, prototype_stride,
        PATCH_ROWS * PATCH_COLUMNS, COLUMNS, DEPTH,
    )  # fmt: skip
    if MASKED:
        there = there & (tl.load(mask + place, mask=there, other=0) != 0)
    value = tl.reshape(tl.where(there, value, 0.0), (PATCH_ROWS, PATCH_COLUMNS))
    a, b = of_rows[:, :, None], of_columns[None, :, :]
    lines = tl.sum(tl.where(a != 0, a * value[None, :, :], 0.0), 1)
    total = tl.sum(tl.where(b != 0, lines[:, None, :] * b, 0.0), 2)
    place = (image.to(tl.int64) * height + row[:, None]) * width + column[None, :]
    tl.store(pixels + place, total, mask=(row < height)[:, None] & (column < width)[None, :])


def cosine_map(
    features: Tensor,
    prototypes: Tensor,
    grid: tuple[int, int, int],
    mask: Tensor | None,
    rows: Axis,
    columns: Axis,
    pixels: Tensor,
) -> None:
    """Fill pixels (B, H, W) float32.

    Args:
        features: (N, D), N = B * h * w, channels contiguous.
        prototypes: (K, D), channels contiguous.
        grid: (B, h, w).
        mask: (B, h, w), uint8, contiguous, 0 where a patch is not scored; or None.
        rows: weights of the rows.
        columns: weights of the columns.
        pixels: (B, H, W), float32, contiguous.
    """
    (n, d), k = features.shape, prototypes.shape[0]
    if n == 0:
        return
    high, wide = rows.blocks[PATCH_ROWS], columns.blocks[PATCH_COLUMNS]
    programs = triton.cdiv(pixels.shape[1], high) * triton.cdiv(pixels.shape[2], wide) * grid[0]
    if k <= MOST_PROTOTYPES and programs <= ONE_WAVE:
        features, prototypes = interpretable(features, prototypes)
        fused[(programs,)](
            features, prototypes, features if mask is None else mask,
            rows.index, rows.weight, columns.index, columns.weight, pixels,
            n, *grid[1:], k, d, features.stride(0), prototypes.stride(0), *pixels.shape[1:],
            rows.index.shape[1], columns.index.shape[1],
            mask is not None, high, wide, PATCH_ROWS, PATCH_COLUMNS,
            FUSED_COLUMNS, FUSED_DEPTH, **FUSED_OPTIONS,
        )  # fmt: skip
        return
    values = torch.empty(grid, dtype=torch.float32, device=features.device)
    if k > MOST_PROTOTYPES:
        index = torch.empty(n, dtype=torch.int64, device=features.device)
        cosine_max.cosine_max(features, prototypes, values.view(-1), index)
    else:
        features, prototypes = interpretable(features, prototypes)
        similarity[(triton.cdiv(n, ROWS),)](
            features, prototypes, values, n, k, d, features.stride(0), prototypes.stride(0),
            ROWS, COLUMNS, DEPTH[features.dtype], **OPTIONS,
        )  # fmt: skip
    resample.launch(values, mask, rows, columns, pixels, similarity=True)


def variants() -> list[Variant]:
    """List the ways in which the launcher calls its own kernels; those of the gather are in `resample`."""
    table = {f"{axis}_{kind}": f"*{'i32' if kind == 'index' else 'fp32'}:16"
             for axis in ("row", "column") for kind in ("index", "weight")}  # fmt: skip
    sizes = dict.fromkeys(("n", "h", "w", "k", "height", "width", "row_entries", "column_entries"), "i32")
    strides = {"d": "i32:16", "feature_stride": "i32:16", "prototype_stride": "i32:16"}
    found = []
    for dtype, name in DTYPES.items():
        constants = {"ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH[dtype]}
        both = {"features": f"*{name}:16", "prototypes": f"*{name}:16"}
        signature = both | {"values": "*fp32:16", "n": "i32", "k": "i32"} | strides
        found.append(Variant(f"cosine_map.similarity {name}", similarity, signature, constants, OPTIONS))
        constants = {"PATCH_ROWS": PATCH_ROWS, "PATCH_COLUMNS": PATCH_COLUMNS, "HIGH": 32, "WIDE": 64}
        constants |= {"COLUMNS": FUSED_COLUMNS, "DEPTH": FUSED_DEPTH}
        signature = both | table | {"pixels": "*fp32:16"} | sizes | strides
        for masked, label in ((0, "all patches"), (1, "masked")):
            signature = signature | {"mask": "*u8:16" if masked else f"*{name}:16"}
            of = f"cosine_map.fused {name} {label}"
            found.append(Variant(of, fused, signature, constants | {"MASKED": masked}, FUSED_OPTIONS))
    return found
