"""kmeans_step: rows find their nearest center; then each center streams over all rows and sums its own."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from dinofast.kernels.tile import DTYPES, Variant, interpretable
from torch import Tensor

ROWS, CENTERS = 64, 16
SUM_ROWS, SUM_CHANNELS = 32, 64
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@triton.jit
def assign(
    rows, centers, index, sq_distance, n, k, d, row_stride, center_stride,
    ROWS: tl.constexpr, CENTERS: tl.constexpr,
):  # fmt: skip
    """Find the nearest center of ROWS rows by sums of (x - c)² in float64, rounded to float32.

    NaN comes from a row or center with NaN or inf, whose products with 0 are NaN; then the index is -1.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value = tl.full((ROWS,), float("inf"), tl.float32)
    nearest = tl.zeros((ROWS,), tl.int32)
    broken = tl.zeros((ROWS,), tl.int32)
    for start in range(0, k, CENTERS):
        center = start + tl.arange(0, CENTERS)
        total = tl.zeros((ROWS, CENTERS), tl.float64)
        nothing = tl.zeros((ROWS, CENTERS), tl.float32)
        for channel in range(d):
            x = tl.load(rows + row.to(tl.int64) * row_stride + channel, mask=row < n, other=0.0)
            c = tl.load(centers + center.to(tl.int64) * center_stride + channel, mask=center < k, other=0.0)
            gap = x.to(tl.float64)[:, None] - c.to(tl.float64)[None, :]
            total += gap * gap
            nothing += (x.to(tl.float32) * 0)[:, None] + (c.to(tl.float32) * 0)[None, :]
        broken = tl.maximum(broken, tl.max((nothing != nothing).to(tl.int32), 1))
        known = (center < k)[None, :] & (total == total)
        gap32 = tl.where(known, total.to(tl.float32), float("inf"))
        least = tl.min(gap32, 1)
        at = tl.min(tl.where(gap32 == least[:, None], center[None, :], 0x7FFFFFFF), 1)
        nearest = tl.where(least < value, at, nearest)
        value = tl.minimum(least, value)
    tl.store(index + row, tl.where(broken > 0, -1, nearest).to(tl.int64), mask=row < n)
    tl.store(sq_distance + row, tl.where(broken > 0, float("nan"), value), mask=row < n)


@triton.jit
def collect(
    rows, index, sums, counts, n, d, row_stride, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Sum the rows of one center over CHANNELS channels in float64, block after block of rows."""
    center = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((CHANNELS,), tl.float64)
    count = tl.zeros((ROWS,), tl.int64)
    for start in range(0, n, ROWS):
        row = start + tl.arange(0, ROWS)
        own = tl.load(index + row, mask=row < n, other=-1) == center
        if tl.max(own.to(tl.int32), 0) > 0:
            place = rows + row.to(tl.int64)[:, None] * row_stride + channel[None, :]
            x = tl.load(place, mask=own[:, None] & (channel < d)[None, :], other=0.0)
            total += tl.sum(x.to(tl.float64), 0)
            count += own.to(tl.int64)
    place = sums + center.to(tl.int64) * d + channel
    tl.store(place, total.to(tl.float32), mask=channel < d)
    tl.store(counts + center, tl.sum(count, 0), mask=tl.program_id(1) == 0)


def kmeans_step(
    rows: Tensor, centers: Tensor, index: Tensor, sq_distance: Tensor, sums: Tensor, counts: Tensor
) -> None:
    """Fill index (N,) int64, sq_distance (N,) float32, sums (K, D) float32 and counts (K,) int64.

    Channels must be contiguous, rows may be strided.
    """
    (n, d), k = rows.shape, centers.shape[0]
    rows, centers = interpretable(rows, centers)
    if n > 0:
        assign[(triton.cdiv(n, ROWS),)](
            rows, centers, index, sq_distance, n, k, d, rows.stride(0), centers.stride(0),
            ROWS, CENTERS, **OPTIONS,
        )  # fmt: skip
    collect[(k, triton.cdiv(d, SUM_CHANNELS))](
        rows, index, sums, counts, n, d, rows.stride(0), SUM_ROWS, SUM_CHANNELS, **OPTIONS
    )


def variants() -> list[Variant]:
    """List the ways in which the launcher calls its kernels."""
    found = []
    for name in DTYPES.values():
        common = {
            "rows": f"*{name}:16",
            "index": "*i64:16",
            "n": "i32",
            "d": "i32:16",
            "row_stride": "i32:16",
        }
        signature = common | {"centers": "*fp32:16", "sq_distance": "*fp32:16", "k": "i32"}
        signature |= {"center_stride": "i32:16"}
        constants = {"ROWS": ROWS, "CENTERS": CENTERS}
        found.append(Variant(f"kmeans_step.assign {name}", assign, signature, constants, OPTIONS))
        signature = common | {"sums": "*fp32:16", "counts": "*i64:16"}
        constants = {"ROWS": SUM_ROWS, "CHANNELS": SUM_CHANNELS}
        found.append(Variant(f"kmeans_step.collect {name}", collect, signature, constants, OPTIONS))
    return found
