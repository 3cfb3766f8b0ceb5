"""Responsibilities of Gaussians with diagonal covariance: bf16 bounds of pairs, float64 where they matter.

With u = x - c, v = m - c for the mean c of all means m: Σ λ (x - m)² = Σ λ u² - 2 Σ λ v u + Σ λ v². Of these
`bound` computes s and t for the first two sums, from factors rounded to bfloat16. Each factor errs by 2⁻⁸ of
itself, a sum of D terms by less than (D + 16) 2⁻²¹ of its terms' magnitudes, and those of the second sum are
at most √(Σ λ u² Σ λ v²) (Cauchy and Schwarz). So the form errs by at most e (s + 2 √(s Σ λ v²) + Σ λ v²);
e = 2⁻⁷ (1 + 2⁻⁵) + (D + 16) 2⁻²¹. Where factors leave the range of bfloat16, the bound is that of x = m.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from dinofast.kernels.tile import DTYPES, Variant, load_rows
from torch import Tensor

PACK_DEPTH = 128
BOUND_ROWS, BOUND_COMPONENTS, BOUND_DEPTH = 64, 64, 64
ROWS, WIDTH, DEPTH = 8, 256, 64
BLOCK, BLOCK_DEPTH = 8, 16
CROWD = 8
"""Pairs a row above which all are computed, BLOCK components at a time."""
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
HALF_LOG_TAU = tl.constexpr(0.5 * math.log(2 * math.pi))
LEAST, MOST = tl.constexpr(2.0**-100), tl.constexpr(2.0**100)
SLACK = tl.constexpr(2.0**-20)
"""Relative, and in nats: more than what float32 does to an upper bound."""
NOTHING = tl.constexpr(float("-inf"))
FAR = tl.constexpr(1024.0)
"""Nats that a float32 difference may span and still be as good as the rest."""


@triton.jit
def pack(
    means, precisions, log_weights, center, constants, scale, linear, spread,
    d, precision_stride, channel_stride, DEPTH: tl.constexpr,
):  # fmt: skip
    """Prepare one component: constants (K,) float64, λ and λ v (K, D) bfloat16, spread Σ λ v² (K,).

    The constant is ln w + ½ Σ ln λ - ½ D ln 2π, NaN for parameters with NaN or inf and for precisions that
    are not positive. Spread is inf where factors may leave the range of bfloat16.
    """
    component = tl.program_id(0).to(tl.int64)
    log_det = tl.zeros((DEPTH,), tl.float64)
    total = tl.zeros((DEPTH,), tl.float64)
    broken = tl.zeros((DEPTH,), tl.int32)
    outside = tl.zeros((DEPTH,), tl.int32)
    for start in range(0, d, DEPTH):
        channel = start + tl.arange(0, DEPTH)
        there = channel < d
        mean = tl.load(means + component * d + channel, mask=there, other=0.0)
        place = precisions + component * precision_stride + channel * channel_stride
        precision = tl.load(place, mask=there, other=1.0)
        gap = mean - tl.load(center + channel, mask=there, other=0.0)
        weighted = precision * gap
        log_det += tl.log(tl.where(precision > 0, precision, 1.0).to(tl.float64))
        total += weighted.to(tl.float64) * gap.to(tl.float64)
        possible = (precision > 0) & (precision < float("inf"))
        broken |= (~(tl.abs(mean) < float("inf")) | ~possible).to(tl.int32)
        fits = (precision >= LEAST) & (precision <= MOST) & (tl.abs(weighted) <= MOST)
        outside |= (~fits).to(tl.int32)
        tl.store(scale + component * d + channel, precision.to(tl.bfloat16), mask=there)
        tl.store(linear + component * d + channel, weighted.to(tl.bfloat16), mask=there)
    constant = tl.load(log_weights + component).to(tl.float64) + 0.5 * tl.sum(log_det, 0) - HALF_LOG_TAU * d
    good = (constant < float("inf")) & (tl.max(broken, 0) == 0)
    tl.store(constants + component, tl.where(good, constant, float("nan")))
    held = tl.where(tl.max(outside, 0) > 0, float("inf"), tl.sum(total, 0))
    tl.store(spread + component, held.to(tl.float32))


@triton.jit
def upper(constant, least_form):
    """Give float32 that are not below constant - ½ least_form; NOTHING where the constant is -inf or NaN."""
    value = constant - 0.5 * least_form + SLACK * (1 + tl.abs(constant))
    return tl.where(constant > NOTHING, value, NOTHING)


@triton.jit
def bound(
    rows, center, scale, linear, constants, spread, bounds, n, k, d, row_stride, stride, error,
    ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Bound the log-probability of every pair from above: bounds (K, stride)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    component = tl.program_id(1) * COMPONENTS + tl.arange(0, COMPONENTS)
    squares = tl.zeros((ROWS, COMPONENTS), tl.float32)
    mixed = tl.zeros((ROWS, COMPONENTS), tl.float32)
    for start in range(0, d, DEPTH):
        channel = start + tl.arange(0, DEPTH)
        x = load_rows(rows, row, channel, n, d, row_stride).to(tl.float32)
        gap = x - tl.load(center + channel, mask=channel < d, other=0.0)[None, :]
        a, b = (gap * gap).to(tl.bfloat16), gap.to(tl.bfloat16)
        s = load_rows(scale, component, channel, k, d, d)
        t = load_rows(linear, component, channel, k, d, d)
        if WIDE:
            a, b, s, t = a.to(tl.float32), b.to(tl.float32), s.to(tl.float32), t.to(tl.float32)
        squares = tl.dot(a, tl.trans(s), squares, input_precision="ieee")
        mixed = tl.dot(b, tl.trans(t), mixed, input_precision="ieee")
    own = tl.load(spread + component, mask=component < k, other=0.0)[None, :]
    lost = error * (squares + 2 * tl.sqrt(squares * own) + own)
    form = squares - 2 * mixed + own - lost
    form = tl.where((lost < float("inf")) & (form > 0), form, 0.0)
    constant = tl.load(constants + component, mask=component < k, other=0.0).to(tl.float32)
    value = upper(constant[None, :], form)
    place = bounds + component.to(tl.int64)[:, None] * stride + row[None, :]
    tl.store(place, tl.trans(value), mask=(component < k)[:, None] & (row < n)[None, :])


@triton.jit
def quadratic(
    rows, means, precisions, row, component, there, d, row_stride, precision_stride, channel_stride,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sum λ (x - m)² in float64 for one component of every row; 0 where nothing is `there`."""
    total = tl.zeros((ROWS, DEPTH), tl.float64)
    row, component = row.to(tl.int64)[:, None], component.to(tl.int64)[:, None]
    for start in range(0, d, DEPTH):
        channel = start + tl.arange(0, DEPTH)
        inside = there[:, None] & (channel < d)[None, :]
        channel = channel[None, :]
        x = tl.load(rows + row * row_stride + channel, mask=inside, other=0.0).to(tl.float64)
        mean = tl.load(means + component * d + channel, mask=inside, other=0.0).to(tl.float64)
        place = precisions + component * precision_stride + channel * channel_stride
        gap = x - mean
        total += tl.load(place, mask=inside, other=0.0).to(tl.float64) * gap * gap
    return tl.sum(total, 1)


@triton.jit
def quadratics(
    rows, means, precisions, row, first, n, k, d, row_stride, precision_stride, channel_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sum λ (x - m)² in float64 for all pairs of rows and BLOCK components from `first` on."""
    total = tl.zeros((ROWS, BLOCK, DEPTH), tl.float64)
    component = first + tl.arange(0, BLOCK)
    for start in range(0, d, DEPTH):
        channel = start + tl.arange(0, DEPTH)
        x = load_rows(rows, row, channel, n, d, row_stride).to(tl.float64)
        mean = load_rows(means, component, channel, k, d, d).to(tl.float64)
        place = component.to(tl.int64)[:, None] * precision_stride + channel[None, :] * channel_stride
        there = (component < k)[:, None] & (channel < d)[None, :]
        precision = tl.load(precisions + place, mask=there, other=0.0).to(tl.float64)
        gap = x[:, None, :] - mean[None, :, :]
        total += precision[None, :, :] * gap * gap
    return tl.sum(total, 2)


@triton.jit
def floor_of(best, drop):
    """Give what an upper bound must reach, in float32, to matter beside a component that reaches `best`."""
    return (best - drop - SLACK * (1 + tl.abs(best))).to(tl.float32)


@triton.jit
def first_largest(value, column):
    """Find the largest of every line and the first column that has it."""
    largest = tl.max(value, 1)
    return largest, tl.min(tl.where(value == largest[:, None], column[None, :], 0x7FFFFFFF), 1)


@triton.jit
def weigh(
    values, weights, log_likelihood, row, base, broken, n, k, stride, drop,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Turn log-probabilities above `base` (ROWS,) into responsibilities, and give their log-sum.

    What is more than `drop` nats below a row's best becomes 0; broken rows NaN.
    """
    peak = tl.full((ROWS,), float("-inf"), values.dtype.element_ty)
    for start in range(0, k, WIDTH):
        place, there = pairs(row, start, n, k, stride, WIDTH)
        peak = tl.maximum(peak, tl.max(tl.load(values + place, mask=there, other=float("-inf")), 1))
    peak = peak + 0.0  # Triton 3.6 compiles no reduction whose result is used twice
    possible = peak > NOTHING
    top = tl.where(possible, peak, 0.0)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, k, WIDTH):
        place, there = pairs(row, start, n, k, stride, WIDTH)
        total += tl.sum(share(tl.load(values + place, mask=there, other=float("-inf")), top, drop), 1)
    unit = tl.where(broken, float("nan"), 1.0 / tl.where(possible, total, 1.0))
    for start in range(0, k, WIDTH):
        place, there = pairs(row, start, n, k, stride, WIDTH)
        weight = share(tl.load(values + place, mask=there, other=float("-inf")), top, drop)
        tl.store(weights + place, weight * unit[:, None], mask=there)
    found = base + top + tl.log(tl.where(possible, total, 1.0).to(tl.float64))
    found = tl.where(broken, float("nan"), tl.where(possible, found, float("-inf")))
    tl.store(log_likelihood + row, found.to(tl.float32), mask=row < n)


@triton.jit
def pairs(row, start, n, k, stride, WIDTH: tl.constexpr):
    """Give the places (rows, WIDTH) of components from `start` on in a (K, stride) matrix; which exist."""
    column = start + tl.arange(0, WIDTH)
    place = column[None, :] * stride + row[:, None]
    return place, (row < n)[:, None] & (column < k)[None, :]


@triton.jit
def share(value, top, drop):
    """Give exp(value - top), or 0 where that is beyond `drop`."""
    below = (value - top[:, None]).to(tl.float32)
    return tl.where(below >= -drop, tl.exp(below), 0.0)


@triton.jit
def assign(
    rows, means, precisions, constants, bounds, log_likelihood,
    n, k, d, row_stride, precision_stride, channel_stride, stride, drop,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    CROWD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Turn the bounds of ROWS rows into responsibilities: compute the pair of largest bound, again and again.

    A row is done when no other pair's bound comes within `drop` nats of the best pair computed. Where more
    than CROWD pairs a row seem to matter, all are computed.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = widest(bounds, row, n, k, stride, ROWS, WIDTH)
    unknown = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, k, WIDTH):
        column = start + tl.arange(0, WIDTH)
        constant = tl.load(constants + column, mask=column < k, other=0.0)
        unknown |= (constant != constant).to(tl.int32)
    form = quadratic(
        rows, means, precisions, row, at, row < n, d, row_stride, precision_stride, channel_stride,
        ROWS, DEPTH,
    )  # fmt: skip
    broken = ~(form < float("inf")) | (tl.max(unknown, 0) > 0)
    best = tl.load(constants + at) - 0.5 * form
    for start in range(0, k, WIDTH):
        place, there = pairs(row, start, n, k, stride, WIDTH)
        waiting = tl.load(bounds + place, mask=there, other=float("-inf"))
        waiting = tl.where(broken[:, None], float("-inf"), waiting)
        found = tl.full((ROWS, WIDTH), float("-inf"), tl.float32)
        before = or_zero(best)
        near = (waiting > NOTHING) & (waiting >= floor_of(best, drop)[:, None])
        if tl.sum(tl.sum(near.to(tl.int32), 1), 0) > CROWD * ROWS:
            top = best
            for block in range(start, tl.minimum(start + WIDTH, k), BLOCK):
                forms = quadratics(
                    rows, means, precisions, row, block, n, k, d, row_stride, precision_stride,
                    channel_stride, ROWS, BLOCK, BLOCK_DEPTH,
                )  # fmt: skip
                inside, known = pairs(row, block, n, k, stride, BLOCK)
                member = block + tl.arange(0, BLOCK)
                constant = tl.load(constants + member, mask=member < k, other=0.0)
                exact = tl.where(known & ~broken[:, None], constant[None, :] - 0.5 * forms, float("-inf"))
                top = tl.maximum(top, tl.max(exact, 1))
                tl.store(bounds + inside, (exact - before[:, None]).to(tl.float32), mask=known)
            tl.debug_barrier()
            if tl.max(or_zero(top) - before, 0) < FAR:
                best = top
                waiting = tl.full((ROWS, WIDTH), float("-inf"), tl.float32)
                found = tl.load(bounds + place, mask=there, other=float("-inf"))
                found += (before - or_zero(best)).to(tl.float32)[:, None]
        column = start + tl.arange(0, WIDTH)
        value, at = first_largest(waiting, column)
        enters = (value > NOTHING) & (value >= floor_of(best, drop))
        while tl.max(enters.to(tl.int32), 0) > 0:
            form = quadratic(
                rows, means, precisions, row, at, enters, d, row_stride, precision_stride, channel_stride,
                ROWS, DEPTH,
            )  # fmt: skip
            exact = tl.load(constants + at, mask=enters, other=float("-inf")) - 0.5 * form
            base = or_zero(best)
            best = tl.maximum(best, exact)
            taken = enters[:, None] & (column[None, :] == at[:, None])
            found += (base - or_zero(best)).to(tl.float32)[:, None]
            found = tl.where(taken, (exact - or_zero(best)).to(tl.float32)[:, None], found)
            waiting = tl.where(taken, float("-inf"), waiting)
            value, at = first_largest(waiting, column)
            enters = (value > NOTHING) & (value >= floor_of(best, drop))
        tl.store(bounds + place, found, mask=there)
        lower = (before - or_zero(best)).to(tl.float32)
        if tl.min(lower, 0) < 0:
            for done in range(0, start, WIDTH):
                place, there = pairs(row, done, n, k, stride, WIDTH)
                found = tl.load(bounds + place, mask=there, other=0.0) + lower[:, None]
                tl.store(bounds + place, found, mask=there)
    tl.debug_barrier()
    weigh(bounds, bounds, log_likelihood, row, or_zero(best), broken, n, k, stride, drop, ROWS, WIDTH)


@triton.jit
def widest(bounds, row, n, k, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Find the first component with the largest bound of every row."""
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    at = tl.zeros((ROWS,), tl.int32)
    for start in range(0, k, WIDTH):
        place, there = pairs(row, start, n, k, stride, WIDTH)
        bound = tl.load(bounds + place, mask=there, other=float("-inf"))
        value, first = first_largest(bound, start + tl.arange(0, WIDTH))
        at = tl.where(value > largest, first, at)
        largest = tl.maximum(largest, value)
    return at


@triton.jit
def or_zero(value):
    """Give 0 for NaN and -inf."""
    return tl.where(value > NOTHING, value, 0.0)


class Diagonal:
    """Components of diagonal or spherical covariance, prepared once for all chunks of rows."""

    def __init__(self, means: Tensor, precisions: Tensor, log_weights: Tensor, drop: float) -> None:
        (k, d), device = means.shape, means.device
        self.means, self.precisions, self.drop = means, precisions, drop
        self.strides = precisions.stride(0), precisions.stride(1) if precisions.dim() == 2 else 0
        self.center = means.mean(0)
        self.scale, self.linear = torch.empty((2, k, d), dtype=torch.bfloat16, device=device).unbind()
        self.constants = torch.empty(k, dtype=torch.float64, device=device)
        self.spread = torch.empty(k, dtype=torch.float32, device=device)
        self.error = 2**-7 * (1 + 2**-5) + (d + 16) * 2**-21
        pack[(k,)](
            means, precisions, log_weights, self.center, self.constants, self.scale, self.linear, self.spread,
            d, *self.strides, PACK_DEPTH, **OPTIONS,
        )  # fmt: skip

    def bound(self, rows: Tensor, bounds: Tensor) -> None:
        """Bound the log-probabilities of rows (n, D) from above: bounds (K, at least n)."""
        (n, d), k = rows.shape, self.means.shape[0]
        bound[(triton.cdiv(n, BOUND_ROWS), triton.cdiv(k, BOUND_COMPONENTS))](
            rows, self.center, self.scale, self.linear, self.constants, self.spread, bounds,
            n, k, d, rows.stride(0), bounds.stride(0), self.error,
            BOUND_ROWS, BOUND_COMPONENTS, BOUND_DEPTH, rows.is_cpu, **OPTIONS,
        )  # fmt: skip

    def assign(self, rows: Tensor, weights: Tensor, log_likelihood: Tensor) -> None:
        """Fill weights (K, at least n) and log_likelihood (n,) of a chunk of rows (n, D)."""
        (n, d), k, stride = rows.shape, self.means.shape[0], weights.stride(0)
        self.bound(rows, weights)
        assign[(triton.cdiv(n, ROWS),)](
            rows, self.means, self.precisions, self.constants, weights, log_likelihood,
            n, k, d, rows.stride(0), *self.strides, stride, self.drop,
            ROWS, WIDTH, DEPTH, CROWD, BLOCK, BLOCK_DEPTH, **OPTIONS,
        )  # fmt: skip


def variants() -> list[Variant]:
    """List the ways in which `Diagonal` calls its kernels."""
    table, wide, half, size, whole = "*fp32:16", "*fp64:16", "*bf16:16", "i32", "i32:16"
    packed = {"center": table, "constants": wide, "scale": half, "linear": half, "spread": table, "d": whole}
    strides = {"precision_stride": whole, "channel_stride": size}
    signature = packed | strides | {"means": table, "precisions": table, "log_weights": table}
    found = [Variant("dpm_stats.pack", pack, signature, {"DEPTH": PACK_DEPTH}, OPTIONS)]
    for name in DTYPES.values():
        common = {"rows": f"*{name}:16", "bounds": table, "n": size, "k": size, "row_stride": whole}
        common |= {"stride": whole}
        signature = packed | common | {"error": "fp32"}
        constants = {"ROWS": BOUND_ROWS, "COMPONENTS": BOUND_COMPONENTS, "DEPTH": BOUND_DEPTH, "WIDE": 0}
        found.append(Variant(f"dpm_stats.bound {name}", bound, signature, constants, OPTIONS))
        signature = common | strides | {"means": table, "precisions": table, "constants": wide, "d": whole}
        signature |= {"log_likelihood": table, "drop": "fp32"}
        constants = {"ROWS": ROWS, "WIDTH": WIDTH, "DEPTH": DEPTH, "CROWD": CROWD}
        constants |= {"BLOCK": BLOCK, "BLOCK_DEPTH": BLOCK_DEPTH}
        found.append(Variant(f"dpm_stats.assign {name}", assign, signature, constants, OPTIONS))
    return found
