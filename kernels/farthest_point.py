"""farthest_point: programs shrink the distances of their rows, a second launch finds the farthest of all."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dinofast.kernels.tile import DTYPES, Variant, interpretable, load_rows, ordered
from torch import Tensor

ROWS, DEPTH = 32, 64
PARTS = 1024
"""Farthest rows that the second launch reads at a time."""
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@triton.jit
def shrink(
    rows, before, center, nearest, keys, n, d, stride, ROWS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """Fill nearest (n,), and for every program the largest key: the code of a distance above n - row.

    NaN has the largest code. A center outside [0, n) makes every distance NaN: nobody is told in time.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    named = tl.load(center)
    at = tl.minimum(tl.maximum(named, 0), n - 1)
    total = tl.zeros((ROWS,), tl.float64)
    for depth in range(0, d, DEPTH):
        channel = depth + tl.arange(0, DEPTH)
        y = tl.load(rows + at * stride + channel, mask=channel < d, other=0.0).to(tl.float32)
        x = load_rows(rows, row, channel, n, d, stride).to(tl.float32)
        gap = (x - y[None, :]).to(tl.float64)
        total += tl.sum(gap * gap, 1)
    distance = tl.where(named == at, tl.sqrt(total).to(tl.float32), float("nan"))
    old = tl.load(before + row, mask=row < n, other=0.0)
    smaller = tl.minimum(old, distance, propagate_nan=tl.PropagateNan.ALL)
    tl.store(nearest + row, smaller, mask=row < n)
    code = tl.where(smaller == smaller, ordered(smaller), 0x7FFFFFFF)
    key = tl.where(row < n, (code.to(tl.int64) << 32) + (n - row), -0x8000000000000000)
    tl.store(keys + tl.program_id(0), tl.max(key, 0))


@triton.jit
def farthest(keys, index, n, parts, PARTS: tl.constexpr):
    """Take the row of the largest key."""
    best = tl.full((PARTS,), -0x8000000000000000, tl.int64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        best = tl.maximum(best, tl.load(keys + part, mask=part < parts, other=-0x8000000000000000))
    tl.store(index, n - (tl.max(best, 0) & 0x7FFFFFFF))


def farthest_point(rows: Tensor, before: Tensor, center: Tensor, nearest: Tensor, index: Tensor) -> None:
    """Fill nearest (N,) float32 and index () int64; channels must be contiguous, N <= 2**30."""
    n, d = rows.shape
    (rows,) = interpretable(rows)
    parts = triton.cdiv(n, ROWS)
    keys = torch.empty(parts, dtype=torch.int64, device=rows.device)
    shrink[(parts,)](rows, before, center, nearest, keys, n, d, rows.stride(0), ROWS, DEPTH, **OPTIONS)
    farthest[(1,)](keys, index, n, parts, PARTS, **OPTIONS)


def variants() -> list[Variant]:
    """List the ways in which the launcher calls its kernels."""
    found = []
    for name in DTYPES.values():
        signature = {"rows": f"*{name}:16", "before": "*fp32:16", "center": "*i64:16", "nearest": "*fp32:16"}
        signature |= {"keys": "*i64:16", "n": "i32", "d": "i32:16", "stride": "i32:16"}
        constants = {"ROWS": ROWS, "DEPTH": DEPTH}
        found.append(Variant(f"farthest_point.shrink {name}", shrink, signature, constants, OPTIONS))
    signature = {"keys": "*i64:16", "index": "*i64:16", "n": "i32", "parts": "i32"}
    found.append(Variant("farthest_point.farthest", farthest, signature, {"PARTS": PARTS}, OPTIONS))
    return found
