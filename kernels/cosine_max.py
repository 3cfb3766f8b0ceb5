"""cosine_max: persistent programs over rows and, when rows are few, parts of the prototypes; then a merge."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dinofast.kernels.schedule import Launch, schedule
from dinofast.kernels.tile import (
    BROKEN,
    DTYPES,
    OPTIONS,
    SCALE_DEPTH,
    SCALE_ROWS,
    Variant,
    cosines,
    far_scaled,
    interpretable,
    keep_best,
    row_scales,
    scale_factors,
)
from torch import Tensor

LAUNCHES = {
    torch.float32: Launch(64, 64, 16, 1, {**OPTIONS, "maxnreg": 168}),
    torch.bfloat16: Launch(64, 64, 64, 2, {**OPTIONS, "maxnreg": 128}),
    torch.float16: Launch(64, 64, 64, 2, {**OPTIONS, "maxnreg": 128}),
}
MERGE_ROWS = 128


@triton.jit
def best(
    features, prototypes, feature_first, feature_second, values, indices,
    n, k, d, feature_stride, prototype_stride, share, blocks, parts,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Find the best of `share` prototypes for ROWS features, item after item; values (parts, n)."""
    for item in tl.range(tl.program_id(0), blocks * parts, tl.num_programs(0)):
        part = item // blocks
        row = item % blocks * ROWS + tl.arange(0, ROWS)
        begin = part * share
        end = tl.minimum(begin + share, k)
        first = tl.load(feature_first + row, mask=row < n, other=0.0)
        second = tl.load(feature_second + row, mask=row < n, other=0.0)
        far = far_scaled(first, second)
        value = tl.full((ROWS,), float("-inf"), tl.float32)
        index = tl.zeros((ROWS,), tl.int32)
        for start in range(begin, end, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            similarity = cosines(
                features, prototypes, row, column, n, end, d, feature_stride, prototype_stride,
                first, second, far, ROWS, COLUMNS, DEPTH,
            )  # fmt: skip
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
    launch = LAUNCHES[features.dtype]
    programs, blocks, parts, share = schedule(features.device, launch, n, k)
    values = torch.empty((parts, n), dtype=torch.float32, device=features.device)
    indices = torch.empty((parts, n), dtype=torch.int32, device=features.device)
    best[(programs,)](
        features, prototypes, *scale_factors(features), values, indices,
        n, k, d, features.stride(0), prototypes.stride(0), share, blocks, parts,
        launch.rows, launch.columns, launch.depth, **launch.options,
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
        signature = {"features": rows, "prototypes": rows, "values": factor, "indices": index}
        signature |= {"feature_first": factor, "feature_second": factor}
        signature |= dict.fromkeys(("n", "k", "blocks", "parts"), size)
        signature |= dict.fromkeys(("d", "feature_stride", "prototype_stride", "share"), whole)
        found.append(LAUNCHES[dtype].variant(f"cosine_max.best {name}", best, signature, {}))
    signature = {"values": factor, "indices": index, "similarity": factor, "number": "*i64:16"}
    signature |= {"n": size, "parts": size}
    found.append(Variant("cosine_max.merge", merge, signature, {"ROWS": MERGE_ROWS}, OPTIONS))
    return found
