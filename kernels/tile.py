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
LONGEST = tl.constexpr(2.0**40)  # rows of this norm, or its reciprocal, have products well within float32


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
        per_processor: programs that are taken to run at once on a multiprocessor.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, int]
    options: dict[str, Any]
    per_processor: int = 1


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
def peak_factor(rows, row, n, d, stride, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Give the power of two that brings each row's largest magnitude to [1, 2); NaN for a broken row."""
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
def scales_of(rows, row, n, d, stride, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Give the two factors that bring rows to unit norm, see `row_scales`."""
    factor = peak_factor(rows, row, n, d, stride, ROWS, DEPTH)
    first = tl.where(factor == factor, factor, 1.0)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, d, DEPTH):
        x = load_rows(rows, row, start + tl.arange(0, DEPTH), n, d, stride).to(tl.float32) * first[:, None]
        total += tl.sum(x * x, 1)
    return first, tl.where(factor == factor, unit_factor(total), float("nan"))


@triton.jit
def row_scales(rows, n, d, stride, first, second, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Find for every row the two factors that bring it to unit norm.

    `first` is the power of two that brings the largest magnitude to [1, 2): exact in every dtype. `second` is
    the reciprocal norm of what results; 0 for a zero row, NaN for a row with NaN or inf.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    power, unit = scales_of(rows, row, n, d, stride, ROWS, DEPTH)
    tl.store(first + row, power, mask=row < n)
    tl.store(second + row, unit, mask=row < n)


@triton.jit
def products(
    queries, bank, row, column, n, m, d, query_stride, bank_stride, query_factor, bank_factor,
    SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Multiply a tile of queries with a tile of the bank, and sum the squares of the bank's on the way.

    With SCALED, rows are first multiplied by their powers of two, in the matrix's own dtype.
    """
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, d, DEPTH):
        channel = start + tl.arange(0, DEPTH)
        x = load_rows(queries, row, channel, n, d, query_stride)
        y = load_rows(bank, column, channel, m, d, bank_stride)
        if SCALED:
            x = (x.to(tl.float32) * query_factor[:, None]).to(x.dtype)
            y = (y.to(tl.float32) * bank_factor[:, None]).to(y.dtype)
        wide = y.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
        product = tl.dot(x, tl.trans(y), product, input_precision="ieee")
    return product, squares


@triton.jit
def far_scaled(first, second):
    """Say (as 1) whether a row is so long or short that its products could leave the range of float32."""
    known = (second > 0) & (second < float("inf"))  # neither zero nor broken
    return tl.max((known & ((first > LONGEST) | (first < 1 / LONGEST))).to(tl.int32), 0)


@triton.jit
def cosines(
    queries, bank, row, column, n, m, d, query_stride, bank_stride, first, second, far,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Give the cosines of a tile of queries and one of the bank, whose rows are read once.

    `first` and `second` are the factors of the queries' `row_scales`, `far` says `far_scaled` of them. A tile
    with rows whose norm or products could leave the range of float32 is computed once more, with both sides
    scaled by powers of two: cosines that both can compute are the same, bit for bit. NaN for a broken row.
    """
    product, squares = products(
        queries, bank, row, column, n, m, d, query_stride, bank_stride, first, first, False,
        ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    of_query = first * second
    safe = ((squares > 1 / LONGEST / LONGEST) & (squares < LONGEST * LONGEST)) | (column >= m)
    if bank.dtype.element_ty == tl.float16:  # its squares do not underflow, but scaled channels would
        safe |= squares == 0
    if tl.maximum(tl.max((~safe).to(tl.int32), 0), far) > 0:
        factor = peak_factor(bank, column, m, d, bank_stride, COLUMNS, DEPTH)
        product, squares = products(
            queries, bank, row, column, n, m, d, query_stride, bank_stride, first, factor, True,
            ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        of_query = second
    return product * of_query[:, None] * unit_factor(squares)[None, :]


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
