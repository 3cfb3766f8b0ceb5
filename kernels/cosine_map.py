"""cosine_map: one launch finds the best similarity of every patch, a second gathers the pixels."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dinofast.kernels import cosine_max, resample
from dinofast.kernels.resample import Axis
from dinofast.kernels.tile import BROKEN, DTYPES, Variant, interpretable, keep_best, load_rows
from torch import Tensor

ROWS, COLUMNS = 16, 32
DEPTH = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
MOST_PROTOTYPES = 1024
"""Beyond, the split search of cosine_max comes first: here one program compares all prototypes."""


@triton.jit
def peak_factor(rows, row, n, d, stride, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Give `first` of `row_scales`, NaN for a row with NaN or inf."""
    peak = tl.zeros((ROWS,), tl.float32)
    broken = tl.zeros((ROWS,), tl.int32)
    for start in range(0, d, DEPTH):
        x = tl.abs(load_rows(rows, row, start + tl.arange(0, DEPTH), n, d, stride).to(tl.float32))
        broken = tl.maximum(broken, tl.max((~(x < float("inf"))).to(tl.int32), 1))
        peak = tl.maximum(peak, tl.max(tl.where(x < float("inf"), x, 0.0), 1))
    exponent = peak.to(tl.int32, bitcast=True) >> 23
    factor = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
    return tl.where(broken > 0, float("nan"), factor)


@triton.jit
def unit_factor(squares):
    """Give the reciprocal norm, 0 for a zero row."""
    return tl.where(squares == 0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(tl.where(squares == 0, 1.0, squares))))


@triton.jit
def similarity(
    features, prototypes, values, n, k, d, feature_stride, prototype_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Find the best similarity of ROWS features to all prototypes, and normalize both on the way."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
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
    tl.store(values + row, tl.where(value == BROKEN, float("nan"), unit), mask=row < n)


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
    """List the ways in which the launcher calls its own kernel; those of the gather are in `resample`."""
    found = []
    for dtype, name in DTYPES.items():
        constants = {"ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH[dtype]}
        signature = {"features": f"*{name}:16", "prototypes": f"*{name}:16", "values": "*fp32:16"}
        signature |= {"n": "i32", "k": "i32", "d": "i32:16"}
        signature |= {"feature_stride": "i32:16", "prototype_stride": "i32:16"}
        found.append(Variant(f"cosine_map.similarity {name}", similarity, signature, constants, OPTIONS))
    return found
