"""Sums of rows by weight, for dpm_stats: each component lists the rows it has a share of and adds them up."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from dinofast.kernels.tile import DTYPES, Variant
from torch import Tensor

LIST_ROWS = 1024
SUM_ROWS, SUM_CHANNELS = 32, 64
PRODUCT_ROWS, PRODUCT_CHANNELS, SEGMENT = 16, 64, 256
Sums = tuple[Tensor, Tensor, Tensor]
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@triton.jit
def compact(weights, index, used, count, n, stride, again, ROWS: tl.constexpr):
    """List the rows of one component whose weight is not 0, in ascending order, and add up the weights.

    Weights (K, stride) are moved to the front of their own line, beside index (K, stride); used (K,) counts
    them. With `again` the sum is added to count (K,), otherwise it replaces it.
    """
    component = tl.program_id(0)
    line = component.to(tl.int64) * stride
    total = tl.zeros((ROWS,), tl.float64)
    found = tl.full((), 0, tl.int32)
    for start in range(0, n, ROWS):
        row = start + tl.arange(0, ROWS)
        weight = tl.load(weights + line + row, mask=row < n, other=0.0)
        kept = weight != 0
        place = line + found + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(weights + place, weight, mask=kept)
        tl.store(index + place, row.to(index.dtype.element_ty), mask=kept)
        found += tl.sum(kept.to(tl.int32), 0)
        total += weight.to(tl.float64)
    before = tl.load(count + component, mask=again != 0, other=0.0).to(tl.float64)
    tl.store(count + component, (before + tl.sum(total, 0)).to(tl.float32))
    tl.store(used + component, found)


@triton.jit
def load_entries(weights, index, line, entry, count):
    """Load weights, 0 beyond `count`, and row numbers of a component's list."""
    there = entry < count
    weight = tl.load(weights + line + entry, mask=there, other=0.0)
    return weight, tl.load(index + line + entry, mask=there, other=0).to(tl.int64), there


@triton.jit
def moments(
    rows, weights, index, used, first, second, d, row_stride, stride, again,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """Sum w x and, where SQUARES, w x² over the list of one component, in float64, over CHANNELS channels."""
    component = tl.program_id(0)
    line = component.to(tl.int64) * stride
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((ROWS, CHANNELS), tl.float64)
    squares = tl.zeros((ROWS, CHANNELS), tl.float64)
    count = tl.load(used + component)
    for start in range(0, count, ROWS):
        weight, row, there = load_entries(weights, index, line, start + tl.arange(0, ROWS), count)
        place = rows + row[:, None] * row_stride + channel[None, :]
        x = tl.load(place, mask=there[:, None] & (channel < d)[None, :], other=0.0).to(tl.float64)
        weighted = x * weight.to(tl.float64)[:, None]
        total += weighted
        if SQUARES:
            squares += weighted * x
    place = component.to(tl.int64) * d + channel
    before = tl.load(first + place, mask=channel < again * d, other=0.0).to(tl.float64)
    tl.store(first + place, (before + tl.sum(total, 0)).to(tl.float32), mask=channel < d)
    if SQUARES:
        before = tl.load(second + place, mask=channel < again * d, other=0.0).to(tl.float64)
        tl.store(second + place, (before + tl.sum(squares, 0)).to(tl.float32), mask=channel < d)


@triton.jit
def products(
    rows, weights, index, used, second, d, row_stride, stride, again,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Sum w x xᵀ over the list of one component: a block of the lower triangle, and its mirror image.

    Every SEGMENT rows are summed by themselves, so that float32 errs little over long lists.
    """
    component = tl.program_id(0)
    line = component.to(tl.int64) * stride
    if tl.program_id(2) <= tl.program_id(1):
        down = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        along = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        total = tl.zeros((CHANNELS, CHANNELS), tl.float32)
        count = tl.load(used + component)
        for begin in range(0, count, SEGMENT):
            part = tl.zeros((CHANNELS, CHANNELS), tl.float32)
            for start in range(begin, tl.minimum(begin + SEGMENT, count), ROWS):
                weight, row, there = load_entries(weights, index, line, start + tl.arange(0, ROWS), count)
                place = rows + row[:, None] * row_stride
                x = tl.load(place + down[None, :], mask=there[:, None] & (down < d)[None, :], other=0.0)
                y = tl.load(place + along[None, :], mask=there[:, None] & (along < d)[None, :], other=0.0)
                weighted = x.to(tl.float32) * weight[:, None]
                part = tl.dot(tl.trans(weighted), y.to(tl.float32), part, input_precision="ieee")
            total += part
        inside = (down < d)[:, None] & (along < d)[None, :]
        block = second + component.to(tl.int64) * d * d
        place = block + down[:, None] * d + along[None, :]
        total += tl.load(place, mask=inside & (down < again * d)[:, None], other=0.0)
        tl.store(place, total, mask=inside)
        if tl.program_id(2) < tl.program_id(1):
            mirrored = block + along[:, None] * d + down[None, :]
            tl.store(mirrored, tl.trans(total), mask=(along < d)[:, None] & (down < d)[None, :])


def add_up(rows: Tensor, weights: Tensor, index: Tensor, used: Tensor, sums: Sums, again: int) -> None:
    """Add the rows of a chunk (n, D), weighted by weights (K, at least n), to count, first and second.

    Second is (K, D) or (K, D, D). The weights are destroyed; index (K, as weights) and used (K,) are room
    for the lists.
    """
    (n, d), k, stride = rows.shape, weights.shape[0], weights.stride(0)
    count, first, second = sums
    compact[(k,)](weights, index, used, count, n, stride, again, LIST_ROWS, **OPTIONS)
    diagonal = second.dim() == 2
    moments[(k, triton.cdiv(d, SUM_CHANNELS))](
        rows, weights, index, used, first, second, d, rows.stride(0), stride, again,
        SUM_ROWS, SUM_CHANNELS, diagonal, **OPTIONS,
    )  # fmt: skip
    if not diagonal:
        blocks = triton.cdiv(d, PRODUCT_CHANNELS)
        products[(k, blocks, blocks)](
            rows, weights, index, used, second, d, rows.stride(0), stride, again,
            PRODUCT_ROWS, PRODUCT_CHANNELS, SEGMENT, **OPTIONS,
        )  # fmt: skip


def variants() -> list[Variant]:
    """List the ways in which `add_up` calls its kernels."""
    lists = {"weights": "*fp32:16", "index": "*i16:16", "used": "*i32:16", "stride": "i32:16", "again": "i32"}
    signature = lists | {"count": "*fp32:16", "n": "i32"}
    found = [Variant("dpm_stats.compact", compact, signature, {"ROWS": LIST_ROWS}, OPTIONS)]
    for name in DTYPES.values():
        signature = lists | {"rows": f"*{name}:16", "first": "*fp32:16", "second": "*fp32:16"}
        signature |= {"d": "i32:16", "row_stride": "i32:16"}
        for squares in (0, 1):
            label = f"dpm_stats.moments {name}" + (" squares" if squares else "")
            constants = {"ROWS": SUM_ROWS, "CHANNELS": SUM_CHANNELS, "SQUARES": squares}
            found.append(Variant(label, moments, signature, constants, OPTIONS))
        signature = {key: kind for key, kind in signature.items() if key != "first"}
        constants = {"ROWS": PRODUCT_ROWS, "CHANNELS": PRODUCT_CHANNELS, "SEGMENT": SEGMENT}
        found.append(Variant(f"dpm_stats.products {name}", products, signature, constants, OPTIONS))
    return found
