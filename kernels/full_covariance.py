"""Responsibilities of Gaussians with full covariance: bf16 bounds of all pairs, float64 where they matter.

The precision is L Lᵀ, L lower triangular, so with y = x - m the form yᵀ L Lᵀ y is at least |Tᵀ z|², for the
last channels z of y and the last block T of L. Factors rounded to bfloat16 and float32 sums err by at most
ERROR |z| |T| (Frobenius; Cauchy and Schwarz), ERROR = 2⁻⁷ (1 + 2⁻⁵) + (TAIL + 16) 2⁻²¹. The factor, computed
in float64, has a backward error below (D + 2) 2⁻⁵³ trace, and |y|² <= 2 |x|² + 2 |m|².
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from dinofast.kernels.knn_topk import square_norms
from dinofast.kernels.responsibilities import NOTHING, SLACK, WIDTH, floor_of, upper, weigh, widest
from dinofast.kernels.tile import DTYPES, Variant
from torch import Tensor

TAIL = 64
"""Channels at most that bound a form."""
FACTORED = 1 << 21
"""Numbers of precisions factored at a time."""
NORM_ROWS, NORM_DEPTH = 16, 128
BOUND_ROWS = 64
ROWS = 8
LIST_ROWS = 1024
FORM_ROWS, FORM_DEPTH = 32, 32
SHARES = 8
"""Programs that share the list of a component."""
ERROR = tl.constexpr(2**-7 * (1 + 2**-5) + (TAIL + 16) * 2**-21)
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@triton.jit
def bound(
    rows, means, tails, size, slack, norms, constants, bounds, n, d, row_stride, stride, tail,
    ROWS: tl.constexpr, TAIL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Bound the log-probability of ROWS rows under one component from above: bounds (K, stride)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    component = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, TAIL)
    there, channel = channel < tail, channel + d - tail
    inside = (row < n)[:, None] & there[None, :]
    x = tl.load(rows + row.to(tl.int64)[:, None] * row_stride + channel[None, :], mask=inside, other=0.0)
    mean = tl.load(means + component * d + channel, mask=there, other=0.0)
    gap = tl.where(inside, x.to(tl.float32) - mean[None, :], 0.0)
    line = tl.arange(0, TAIL)
    place = tails + component * TAIL * TAIL + line[:, None] * TAIL + line[None, :]
    factor, rounded = tl.load(place), gap.to(tl.bfloat16)
    if WIDE:
        factor, rounded = factor.to(tl.float32), rounded.to(tl.float32)
    z = tl.dot(rounded, factor, input_precision="ieee")
    length = tl.sqrt(tl.sum(z * z, 1)) - ERROR * tl.sqrt(tl.sum(gap * gap, 1)) * tl.load(size + component)
    norm = tl.load(norms + row, mask=row < n, other=0.0)
    form = length * length * (1 - SLACK) - tl.load(slack + 2 * component) * norm
    form -= tl.load(slack + 2 * component + 1)
    form = tl.where((length > 0) & (form > 0) & (form < float("inf")), form, 0.0)
    constant = tl.load(constants + component).to(tl.float32)
    tl.store(bounds + component * stride + row, upper(constant, form), mask=row < n)


@triton.jit
def choose(bounds, chosen, n, k, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Find the component with the largest bound of every row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(chosen + row, widest(bounds, row, n, k, stride, ROWS, WIDTH), mask=row < n)


@triton.jit
def collect(
    bounds, values, chosen, best, index, used, n, stride, drop, ROWS: tl.constexpr, FIRST: tl.constexpr
):  # fmt: skip
    """List the rows whose pair with one component must be computed.

    FIRST those that chose it; later the others whose bound comes within `drop` nats of their best (n,).
    Values (K, stride) of pairs that are never computed become -inf.
    """
    component = tl.program_id(0)
    line = component.to(tl.int64) * stride
    found = tl.full((), 0, tl.int32)
    for start in range(0, n, ROWS):
        row = start + tl.arange(0, ROWS)
        own = tl.load(chosen + row, mask=row < n, other=-1) == component
        kept = own
        if not FIRST:
            value = tl.load(bounds + line + row, mask=row < n, other=float("-inf"))
            known = tl.load(best + row, mask=row < n, other=float("nan"))
            kept = ~own & (value > NOTHING) & (value >= floor_of(known, drop))
            left = tl.full((ROWS,), float("-inf"), tl.float64)
            tl.store(values + line + row, left, mask=(row < n) & ~own & ~kept)
        place = line + found + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(index + place, row.to(index.dtype.element_ty), mask=kept)
        found += tl.sum(kept.to(tl.int32), 0)
    tl.store(used + component, found)


@triton.jit
def evaluate(
    rows, means, precisions, constants, values, best, index, used, d, row_stride, stride,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, SHARES: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Compute listed pairs in float64; FIRST also into best, NaN for rows with NaN or inf."""
    component = tl.program_id(0).to(tl.int64)
    line = component * stride
    count = tl.load(used + component)
    constant = tl.load(constants + component)
    for start in range(tl.program_id(1) * ROWS, count, SHARES * ROWS):
        entry = start + tl.arange(0, ROWS)
        there = entry < count
        row = tl.load(index + line + entry, mask=there, other=0).to(tl.int64)
        form = tl.zeros((ROWS,), tl.float64)
        for down in range(0, d, DEPTH):
            i = down + tl.arange(0, DEPTH)
            product = tl.zeros((ROWS, DEPTH), tl.float64)
            for along in range(0, d, DEPTH):
                j = along + tl.arange(0, DEPTH)
                inside = there[:, None] & (j < d)[None, :]
                gap = tl.zeros((ROWS, DEPTH), tl.float64)
                wide = tl.zeros((DEPTH, DEPTH), tl.float64)
                place = precisions + (component * d + j[:, None]) * d + i[None, :]
                if along < d:  # always; without it Triton 3.6 takes the operands for narrower ones
                    x = tl.load(rows + row[:, None] * row_stride + j[None, :], mask=inside, other=0.0)
                    mean = tl.load(means + component * d + j, mask=j < d, other=0.0)
                    gap = tl.where(inside, x.to(tl.float64) - mean.to(tl.float64)[None, :], 0.0)
                    part = tl.load(place, mask=(j < d)[:, None] & (i < d)[None, :], other=0.0)
                    wide = part.to(tl.float64)
                product = tl.dot(gap, wide, product, out_dtype=tl.float64)
            inside = there[:, None] & (i < d)[None, :]
            x = tl.load(rows + row[:, None] * row_stride + i[None, :], mask=inside, other=0.0)
            mean = tl.load(means + component * d + i, mask=i < d, other=0.0)
            gap = tl.where(inside, x.to(tl.float64) - mean.to(tl.float64)[None, :], 0.0)
            form += tl.sum(product * gap, 1)
        value = constant - 0.5 * tl.where(form < 0, 0.0, form)
        value = tl.where(form < float("inf"), value, float("nan"))
        tl.store(values + line + row, value, mask=there)
        if FIRST:
            tl.store(best + row, value, mask=there)


@triton.jit
def divide(
    values, weights, best, log_likelihood, n, k, stride, drop, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Turn log-probabilities into responsibilities; those of a row whose best is NaN are NaN."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = tl.load(best + row, mask=row < n, other=0.0)
    weigh(values, weights, log_likelihood, row, 0.0, known != known, n, k, stride, drop, ROWS, WIDTH)


class Full:
    """Components of full covariance, prepared once for all chunks of rows."""

    def __init__(self, means: Tensor, precisions: Tensor, log_weights: Tensor, drop: float) -> None:
        (k, d), device = means.shape, means.device
        self.means, self.precisions, self.drop = means, precisions, drop
        self.values: Tensor | None = None
        self.tail = min(d, TAIL)
        self.tails = torch.zeros((k, TAIL, TAIL), dtype=torch.bfloat16, device=device)
        self.size, trace = torch.empty((2, k), dtype=torch.float64, device=device).unbind()
        failed = torch.empty(k, dtype=torch.int32, device=device)
        constants = log_weights.double() - d * (0.5 * math.log(2 * math.pi))
        step = max(1, FACTORED // d**2)
        for part in (slice(start, start + step) for start in range(0, k, step)):
            factor, failed[part] = torch.linalg.cholesky_ex(precisions[part].double())
            constants[part] += factor.diagonal(dim1=1, dim2=2).log().sum(1)
            last = factor[:, d - self.tail :, d - self.tail :]
            self.tails[part, : self.tail, : self.tail] = last
            self.size[part] = last.square().sum((1, 2)).sqrt()
            trace[part] = precisions[part].diagonal(dim1=1, dim2=2).sum(1)
        broken = ~means.isfinite().all() | ~(constants < torch.inf).all() | (failed != 0).any()
        self.constants = constants.masked_fill(broken, torch.nan)
        fits = (self.size > 2**-60) & (self.size < 2**60)
        self.size = self.size.masked_fill(~fits, torch.inf).float()
        rounding = 1.01 * 2 * (d + 2) * 2**-53 * trace
        self.slack = torch.stack([rounding, rounding * means.double().square().sum(1)], 1).float()

    def bound(self, rows: Tensor, bounds: Tensor) -> None:
        """Bound the log-probabilities of rows (n, D) from above: bounds (K, at least n)."""
        (n, d), k = rows.shape, self.means.shape[0]
        norms = torch.empty(n, dtype=torch.float32, device=rows.device)
        square_norms[(triton.cdiv(n, NORM_ROWS),)](
            rows, n, d, rows.stride(0), norms, NORM_ROWS, NORM_DEPTH, **OPTIONS
        )
        bound[(triton.cdiv(n, BOUND_ROWS), k)](
            rows, self.means, self.tails, self.size, self.slack, norms, self.constants, bounds,
            n, d, rows.stride(0), bounds.stride(0), self.tail, BOUND_ROWS, TAIL, rows.is_cpu, **OPTIONS,
        )  # fmt: skip

    def assign(
        self, rows: Tensor, weights: Tensor, log_likelihood: Tensor, index: Tensor, used: Tensor
    ) -> None:
        """Fill weights (K, at least n) and log_likelihood (n,) of a chunk of rows (n, D)."""
        (n, d), k, stride, device = rows.shape, self.means.shape[0], weights.stride(0), rows.device
        chosen = torch.empty(n, dtype=torch.int32, device=device)
        best = torch.empty(n, dtype=torch.float64, device=device)
        if self.values is None:
            self.values = torch.empty(weights.shape, dtype=torch.float64, device=device)
        self.bound(rows, weights)
        blocks = (triton.cdiv(n, ROWS),)
        choose[blocks](weights, chosen, n, k, stride, ROWS, WIDTH, **OPTIONS)
        for first in (True, False):
            collect[(k,)](
                weights, self.values, chosen, best, index, used, n, stride, self.drop,
                LIST_ROWS, first, **OPTIONS,
            )  # fmt: skip
            evaluate[(k, SHARES)](
                rows, self.means, self.precisions, self.constants, self.values, best, index, used,
                d, rows.stride(0), stride, FORM_ROWS, FORM_DEPTH, SHARES, first, **OPTIONS,
            )  # fmt: skip
        divide[blocks](
            self.values, weights, best, log_likelihood, n, k, stride, self.drop, ROWS, WIDTH, **OPTIONS
        )


def variants() -> list[Variant]:
    """List the ways in which `Full` calls its kernels."""
    table, wide, number, size, whole = "*fp32:16", "*fp64:16", "*i32:16", "i32", "i32:16"
    lists = {"values": wide, "best": wide, "index": "*i16:16", "used": number, "stride": whole}
    numbers = {"n": size, "k": size, "stride": whole}
    blocks = {"ROWS": ROWS, "WIDTH": WIDTH}
    signature = numbers | {"bounds": table, "chosen": number}
    found = [Variant("dpm_stats.choose", choose, signature, blocks, OPTIONS)]
    signature = numbers | {"values": wide, "weights": table, "best": wide, "log_likelihood": table}
    signature |= {"drop": "fp32"}
    found.append(Variant("dpm_stats.divide", divide, signature, blocks, OPTIONS))
    for first in (1, 0):
        signature = lists | {"bounds": table, "chosen": number, "n": size, "drop": "fp32"}
        constants = {"ROWS": LIST_ROWS, "FIRST": first}
        label = f"dpm_stats.collect {'first' if first else 'others'}"
        found.append(Variant(label, collect, signature, constants, OPTIONS))
    for name in DTYPES.values():
        common = {"rows": f"*{name}:16", "means": table, "constants": wide, "d": whole}
        common |= {"row_stride": whole, "stride": whole}
        signature = common | {"tails": "*bf16:16", "size": table, "slack": table, "norms": table}
        signature |= {"bounds": table, "n": size, "tail": whole}
        constants = {"ROWS": BOUND_ROWS, "TAIL": TAIL, "WIDE": 0}
        found.append(Variant(f"dpm_stats.bound {name} full", bound, signature, constants, OPTIONS))
        for first in (1, 0):
            label = f"dpm_stats.evaluate {name} {'first' if first else 'others'}"
            constants = {"ROWS": FORM_ROWS, "DEPTH": FORM_DEPTH, "SHARES": SHARES, "FIRST": first}
            signature = common | lists | {"precisions": table}
            found.append(Variant(label, evaluate, signature, constants, OPTIONS))
    return found
