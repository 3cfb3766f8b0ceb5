"""cosine_max: programs split over rows and, when rows are few, over prototypes; a second kernel merges."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dinofast.kernels.tile import (
    BROKEN,
    DTYPES,
    OPTIONS,
    SCALE_DEPTH,
    SCALE_ROWS,
    Variant,
    interpretable,
    keep_best,
    load_scaled,
    row_scales,
    scale_factors,
)
from torch import Tensor

ROWS, COLUMNS = 64, 64
DEPTH = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
MERGE_ROWS = 128
SPLITS = 64
"""Most parts into which the prototypes are split."""
PROGRAMS = 512
"""Programs that keep a large GPU busy."""


@triton.jit
def best(
    features, prototypes, feature_first, feature_second, prototype_first, prototype_second,
    values, indices, n, k, d, feature_stride, prototype_stride, share,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Find the best of `share` prototypes for ROWS features; one row of values (parts, n) a part."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    begin = part * share
    end = tl.minimum(begin + share, k)
    feature_unit = tl.load(feature_second + row, mask=row < n, other=0.0)
    value = tl.full((ROWS,), float("-inf"), tl.float32)
    index = tl.zeros((ROWS,), tl.int32)
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in range(0, d, DEPTH):
            channel = depth + tl.arange(0, DEPTH)
            x = load_scaled(features, feature_first, row, channel, n, d, feature_stride)
            y = load_scaled(prototypes, prototype_first, column, channel, end, d, prototype_stride)
            product = tl.dot(x, tl.trans(y), product, input_precision="ieee")
        prototype_unit = tl.load(prototype_second + column, mask=column < end, other=0.0)
        similarity = product * feature_unit[:, None] * prototype_unit[None, :]
        similarity = tl.where((column < end)[None, :], similarity, float("-inf"))
        value, index = keep_best(value, index, similarity, column)
    offset = part.to(tl.int64) * n + row
    tl.store(values + offset, value, mask=row < n)
    tl.store(indices + offset, index, mask=row < n)


@triton.jit
def merge(values, indices, similarity, number, n, parts, ROWS: tl.constexpr):
    """Take the best over the parts, which stand in ascending order of prototypes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value = tl.full((ROWS,), float("-inf"), tl.float32)
    index = tl.zeros((ROWS,), tl.int32)
    for part in range(parts):
        offset = tl.cast(part, tl.int64) * n + row
        candidate = tl.load(values + offset, mask=row < n, other=float("-inf"))
        better = candidate > value
        index = tl.where(better, tl.load(indices + offset, mask=row < n, other=0), index)
        value = tl.where(better, candidate, value)
    unit = tl.minimum(tl.maximum(value, -1.0), 1.0)
    tl.store(similarity + row, tl.where(value == BROKEN, float("nan"), unit), mask=row < n)
    tl.store(number + row, index.to(tl.int64), mask=row < n)


def cosine_max(features: Tensor, prototypes: Tensor, similarity: Tensor, index: Tensor) -> None:
    """Fill similarity (N,) float32 and index (N,) int64; channels must be contiguous, rows may be strided."""
    (n, d), k = features.shape, prototypes.shape[0]
    if n == 0:
        return
    features, prototypes = interpretable(features, prototypes)
    blocks = triton.cdiv(n, ROWS)
    parts = max(1, min(SPLITS, triton.cdiv(k, COLUMNS), PROGRAMS // blocks))
    share = triton.cdiv(triton.cdiv(k, COLUMNS), parts) * COLUMNS
    parts = triton.cdiv(k, share)
    values = torch.empty((parts, n), dtype=torch.float32, device=features.device)
    indices = torch.empty((parts, n), dtype=torch.int32, device=features.device)
    best[(blocks, parts)](
        features, prototypes, *scale_factors(features), *scale_factors(prototypes), values, indices,
        n, k, d, features.stride(0), prototypes.stride(0), share,
        ROWS, COLUMNS, DEPTH[features.dtype], **OPTIONS,
    )  # fmt: skip
    merge[(triton.cdiv(n, MERGE_ROWS),)](values, indices, similarity, index, n, parts, MERGE_ROWS, **OPTIONS)


def variants() -> list[Variant]:
    """List the ways in which the launcher calls its kernels."""
    factor, index, size, whole = "*fp32:16", "*i32:16", "i32", "i32:16"
    found = []
    for dtype, name in DTYPES.items():
        rows = f"*{name}:16"
        signature = {"rows": rows, "n": size, "d": whole, "stride": whole, "first": factor, "second": factor}
        constants = {"ROWS": SCALE_ROWS, "DEPTH": SCALE_DEPTH}
        found.append(Variant(f"cosine_max.row_scales {name}", row_scales, signature, constants, OPTIONS))
        signature = {
            "features": rows, "prototypes": rows, "feature_first": factor, "feature_second": factor,
            "prototype_first": factor, "prototype_second": factor, "values": factor, "indices": index,
            "n": size, "k": size, "d": whole,
            "feature_stride": whole, "prototype_stride": whole, "share": whole,
        }  # fmt: skip
        constants = {"ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH[dtype]}
        found.append(Variant(f"cosine_max.best {name}", best, signature, constants, OPTIONS))
    signature = {"values": factor, "indices": index, "similarity": factor, "number": "*i64:16"}
    signature |= {"n": size, "parts": size}
    found.append(Variant("cosine_max.merge", merge, signature, {"ROWS": MERGE_ROWS}, OPTIONS))
    return found
