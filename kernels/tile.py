"""What kernels share: scaled loads, row norms, ordered codes, a running best that keeps NaN and the first."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BROKEN = tl.constexpr(float("inf"))  # stands for NaN in a running maximum: larger than any similarity


@dataclass(frozen=True)
class Variant:
    """One way in which a launcher calls a kernel, for compiling ahead of time.

    Attributes:
        name: operator, kernel and dtype, such as "cosine_max.best fp32".
        kernel: the `@triton.jit` function.
        signature: argument name -> Triton type, such as "*fp32"; a type that ends in ":16" belongs to a
            pointer or number that is divisible by 16, as it usually is at run time.
        constants: argument name -> value.
        options: launch options, such as num_warps.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, int]
    options: dict[str, Any]


DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SCALE_ROWS, SCALE_DEPTH = 16, 128
OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}


def interpretable(*matrices: Tensor) -> tuple[Tensor, ...]:
    """Give matrices as the interpreter can multiply them: of bfloat16 it multiplies the bits."""
    return tuple(x.float() if x.is_cpu and x.dtype == torch.bfloat16 else x for x in matrices)


def scale_factors(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `row_scales` on rows (N, D) and give both factors, (N,) float32 each."""
    n, d = rows.shape
    first, second = (torch.empty(n, dtype=torch.float32, device=rows.device) for _ in range(2))
    if n > 0:
        row_scales[(triton.cdiv(n, SCALE_ROWS),)](
            rows, n, d, rows.stride(0), first, second, SCALE_ROWS, SCALE_DEPTH, **OPTIONS
        )
    return first, second


@triton.jit
def load_rows(pointer, row, column, n, d, stride):
    """Load a block (rows, columns) of an (n, d) matrix; what is absent is zero."""
    offset = row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(pointer + offset, mask=(row < n)[:, None] & (column < d)[None, :], other=0.0)


@triton.jit
def row_scales(rows, n, d, stride, first, second, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Find for every row the two factors that bring it to unit norm.

    `first` is the power of two that brings the largest magnitude to [1, 2): exact in every dtype. `second` is
    the reciprocal norm of what results; 0 for a zero row, NaN for a row with NaN or inf.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    peak = tl.zeros((ROWS,), tl.float32)
    broken = tl.zeros((ROWS,), tl.int32)
    for start in range(0, d, DEPTH):
        x = load_rows(rows, row, start + tl.arange(0, DEPTH), n, d, stride).to(tl.float32)
        infinite = ~(tl.abs(x) < float("inf"))
        broken = tl.maximum(broken, tl.max(infinite.to(tl.int32), 1))
        peak = tl.maximum(peak, tl.max(tl.where(infinite, 0.0, tl.abs(x)), 1))
    exponent = peak.to(tl.int32, bitcast=True) >> 23
    factor = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, d, DEPTH):
        x = load_rows(rows, row, start + tl.arange(0, DEPTH), n, d, stride).to(tl.float32) * factor[:, None]
        total += tl.sum(x * x, 1)
    unit = tl.where(total == 0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(tl.where(total == 0, 1.0, total))))
    unit = tl.where(broken > 0, float("nan"), unit)
    tl.store(first + row, tl.where(broken > 0, 1.0, factor), mask=row < n)
    tl.store(second + row, unit, mask=row < n)


@triton.jit
def load_scaled(pointer, scale, row, column, n, d, stride):
    """Load a block as `load_rows` does, each row times its power of two, in the matrix's own dtype."""
    x = load_rows(pointer, row, column, n, d, stride)
    factor = tl.load(scale + row, mask=row < n, other=0.0)
    return (x.to(tl.float32) * factor[:, None]).to(x.dtype)


@triton.jit
def ordered(value):
    """Give float32 values as int32 codes that order alike; 0 and -0 are one, NaN comes before all."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(value == value, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)


@triton.jit
def keep_best(value, index, candidate, column):
    """Update the running best (rows,) by candidates (rows, columns) in ascending order of `column`.

    NaN wins and is held as BROKEN; equal candidates keep the smallest column.
    """
    candidate = tl.where(candidate == candidate, candidate, BROKEN)
    top = tl.max(candidate, 1)
    at = tl.min(tl.where(candidate == top[:, None], column[None, :], 0x7FFFFFFF), 1)
    better = top > value
    return tl.where(better, top, value), tl.where(better, at, index)
