"""knn_topk over coded rows: a scan of codes lists what may be nearest, the direct difference decides.

A pair's score is x'y' − |y'|²/2 for centered rows x', y': higher is nearer. Of a product of codes it is known
within `slack` = rest(x)·norm(y) + norm(x)·rest(y) (Cauchy-Schwarz) and within gamma times both squared norms
(rounding). A query keeps its k highest lower bounds; rows whose upper bound reaches the lowest of these are
listed, all others are farther. A query whose list is too short is decided against all rows instead.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from dinofast.kernels.knn_topk import (
    COSINE,
    DECIDE_DEPTH,
    DECIDE_OPTIONS,
    MAX_K,
    NONE,
    direct,
    empty_keys,
    keep_least,
)
from dinofast.kernels.schedule import Launch, schedule
from dinofast.kernels.tile import OPTIONS, Variant, interpretable, load_rows, ordered
from torch import Tensor

SIEVES = {
    torch.int8: Launch(64, 64, 64, 1, {**OPTIONS, "maxnreg": 240}),
    torch.bfloat16: Launch(64, 64, 64, 1, {**OPTIONS, "maxnreg": 240}),
    torch.float32: Launch(32, 64, 16, 1, {**OPTIONS, "num_stages": 2, "maxnreg": 168}),
}
"""Codes -> the launch of `sieve`: none spills a register by Triton 3.9. No GPU has compared them yet,
nor the numbers below."""
PARTS = 64
"""Most parts into which the bank is split where all rows are decided."""
STRIDE = 16
"""One block of columns in so many is looked at before the scan, for bounds to begin with."""
ROOM = 256
"""Rows that may be listed for a query and part."""
CHUNK = 16
"""Rows that are decided at a time."""
DECIDE_FEW_OPTIONS = DECIDE_OPTIONS | {"num_warps": 2}


@triton.jit
def sieve(
    queries, codes, query_scale, query_norm, query_rest, query_error, scale, norm, rest, half,
    start_from, lowest, upper_of, row_of, listed,
    q, m, d, query_stride, codes_stride, share, step, k, blocks, parts, room, gamma, tiny,
    LIST: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Fill lowest (q, parts, SLOTS): the k highest lower bounds of a part, at least start_from (q,).

    With LIST, also list the rows that may reach them: row_of and upper_of (q, parts, room), and their number,
    listed (q, parts), those without room included. Looks at COLUMNS rows, then goes on by `step`.
    """
    for item in tl.range(tl.program_id(0), blocks * parts, tl.num_programs(0)):
        part = item // blocks
        row = item % blocks * ROWS + tl.arange(0, ROWS)
        begin = part * share
        end = tl.minimum(begin + share, m)
        inside = row < q
        x_scale = tl.load(query_scale + row, mask=inside, other=0.0)
        x_norm = tl.load(query_norm + row, mask=inside, other=0.0)
        x_rest = tl.load(query_rest + row, mask=inside, other=0.0)
        x_error = tl.load(query_error + row, mask=inside, other=0.0)
        worst = tl.load(start_from + row, mask=inside, other=float("inf"))
        slot = tl.zeros((ROWS, SLOTS), tl.int32) + tl.arange(0, SLOTS)[None, :]
        kept = tl.where(slot < k, worst[:, None], float("inf"))
        count = tl.zeros((ROWS,), tl.int32)
        place = (row.to(tl.int64) * parts + part) * room
        for first in range(begin, end, step):
            column = first + tl.arange(0, COLUMNS)
            if codes.dtype.element_ty == tl.int8:
                product = tl.zeros((ROWS, COLUMNS), tl.int32)
            else:
                product = tl.zeros((ROWS, COLUMNS), tl.float32)
            for depth in range(0, d, DEPTH):
                channel = depth + tl.arange(0, DEPTH)
                x = load_rows(queries, row, channel, q, d, query_stride)
                y = load_rows(codes, column, channel, end, d, codes_stride)
                if codes.dtype.element_ty == tl.int8:
                    product = tl.dot(x, tl.trans(y), product, out_dtype=tl.int32)
                else:
                    product = tl.dot(x, tl.trans(y), product, input_precision="ieee")
            present = column < end
            y_norm = tl.load(norm + column, mask=present, other=0.0)
            y_rest = tl.load(rest + column, mask=present, other=0.0)
            y_half = tl.load(half + column, mask=present, other=float("inf"))
            y_scale = tl.load(scale + column, mask=present, other=0.0)
            y_error = gamma * y_norm * y_norm + tiny
            slack = x_rest[:, None] * y_norm[None, :] + x_norm[:, None] * y_rest[None, :]
            score = product.to(tl.float32) * y_scale[None, :] * x_scale[:, None] - y_half[None, :]
            upper = score + (slack + y_error[None, :])
            reaches = ~(upper < (worst - x_error)[:, None]) & present[None, :]  # NaN bounds nothing
            if tl.max(tl.max(reaches.to(tl.int32), 1), 0) > 0:
                lower = score - (slack + y_error[None, :])
                lower = tl.where(present[None, :] & (lower == lower), lower, float("-inf"))
                best = tl.max(lower, 1)
                enters = best > worst
                while tl.max(enters.to(tl.int32), 0) > 0:
                    out = tl.min(tl.where(kept == worst[:, None], slot, SLOTS), 1)
                    kept = tl.where(enters[:, None] & (slot == out[:, None]), best[:, None], kept)
                    worst = tl.min(kept, 1)
                    at = tl.min(tl.where(lower == best[:, None], column[None, :], 0x7FFFFFFF), 1)
                    lower = tl.where(column[None, :] == at[:, None], float("-inf"), lower)
                    best = tl.max(lower, 1)
                    enters = best > worst
                if LIST:
                    hit = (~(upper < (worst - x_error)[:, None]) & present[None, :] & inside[:, None]).to(
                        tl.int32
                    )
                    entry = count[:, None] + tl.cumsum(hit, 1) - hit
                    fits = (hit > 0) & (entry < room)
                    columns = tl.zeros((ROWS, COLUMNS), tl.int32) + column[None, :]
                    tl.store(row_of + place[:, None] + entry, columns, mask=fits)
                    tl.store(upper_of + place[:, None] + entry, upper, mask=fits)
                    count += tl.sum(hit, 1)
        if LIST:
            tl.store(listed + row.to(tl.int64) * parts + part, count, mask=inside)
        place = (row.to(tl.int64)[:, None] * parts + part) * SLOTS + tl.arange(0, SLOTS)[None, :]
        tl.store(lowest + place, kept, mask=inside[:, None] & (slot < k))


@triton.jit
def factors_of(first, second, label, present, METRIC: tl.constexpr, CHUNK: tl.constexpr):
    """Load the factors of rows by their number; the other metrics have none."""
    power = tl.full((CHUNK,), 1.0, tl.float32)
    unit = power
    if METRIC == COSINE:
        power = tl.load(first + label, mask=present, other=0.0)
        unit = tl.load(second + label, mask=present, other=0.0)
    return power, unit


@triton.jit
def rescore(
    queries, rows, query_first, query_second, first, second, needed, upper_of, row_of, at_of,
    listed, keys, used, d, query_stride, rows_stride, k, parts, room,
    METRIC: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Decide what is listed for one query and part and reaches needed (q,).

    Fills keys (q, parts, SLOTS), the code of a distance above the row's number, and used (q, parts).
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.arange(0, SLOTS)
    kept = empty_keys(slot, k)
    worst = tl.max(kept, 0)
    reach = tl.load(needed + row)
    count = tl.minimum(tl.load(listed + row * parts + part), room)
    found = 0
    for start in range(0, count, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        place = (row * parts + part) * room + entry
        upper = tl.load(upper_of + place, mask=entry < count, other=float("-inf"))
        wanted = ~(upper < reach) & (entry < count)
        number = tl.sum(wanted.to(tl.int32), 0)
        if number > 0:
            label = tl.load(row_of + place, mask=wanted, other=0).to(tl.int64)
            at = tl.load(at_of + place, mask=wanted, other=0).to(tl.int64)
            power, unit = factors_of(first, second, label, wanted, METRIC, CHUNK)
            total = direct(
                queries, rows, row, at, wanted, query_first, query_second, power, unit,
                d, query_stride, rows_stride, METRIC, CHUNK, DEPTH,
            )  # fmt: skip
            key = tl.where(wanted, (ordered(total).to(tl.int64) << 32) + label, NONE)
            kept, worst = keep_least(kept, worst, key, SLOTS)
            found += number
    tl.store(used + row * parts + part, found)
    tl.store(keys + (row * parts + part) * SLOTS + slot, kept, mask=slot < k)


@triton.jit
def exhaust(
    queries, rows, query_first, query_second, first, second, wanted, keys, m, offset,
    d, query_stride, rows_stride, share, k, parts,
    METRIC: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Decide all of m rows, numbered from `offset`, for a query that is wanted (q,), one part a program."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if tl.load(wanted + row) != 0:
        slot = tl.arange(0, SLOTS)
        kept = empty_keys(slot, k)
        worst = tl.max(kept, 0)
        end = tl.minimum(part * share + share, m)
        for start in range(part * share, end, CHUNK):
            at = (start + tl.arange(0, CHUNK)).to(tl.int64)
            present = at < end
            power, unit = factors_of(first, second, at, present, METRIC, CHUNK)
            total = direct(
                queries, rows, row, at, present, query_first, query_second, power, unit,
                d, query_stride, rows_stride, METRIC, CHUNK, DEPTH,
            )  # fmt: skip
            key = tl.where(present, (ordered(total).to(tl.int64) << 32) + at + offset, NONE)
            kept, worst = keep_least(kept, worst, key, SLOTS)
        tl.store(keys + (row * parts + part) * SLOTS + slot, kept, mask=slot < k)


class Lists(NamedTuple):
    """Rows that may be among the nearest.

    Attributes:
        row: (Q, parts, room), int32.
        upper: (Q, parts, room), float32, of the score.
        listed: (Q, parts), int32: entries; more than the room when rows are missing.
        needed: (Q,), float32: upper bounds below this are not needed any more.
    """

    row: Tensor
    upper: Tensor
    listed: Tensor
    needed: Tensor


def list_rows(
    queries: tuple[Tensor, ...], rows: tuple[Tensor, ...], k: int, settled: Tensor, gamma: float, tiny: float
) -> Lists:
    """List for every query the coded rows that may be among its k nearest; k <= MAX_K.

    Both are codes (N, D) with scale, norm, rest and half (N,) each; nothing is listed for `settled` (Q,).
    """
    (q, d), m = queries[0].shape, rows[0].shape[0]
    device, slots = rows[0].device, triton.next_power_of_2(k)
    launch = SIEVES[rows[0].dtype]
    programs, blocks, parts, share = schedule(device, launch, q, m)
    room = min(ROOM, share)
    x, x_scale, x_norm, x_rest, _ = queries
    x_error = torch.where(settled, 0.0, 2 * (gamma * x_norm * x_norm + tiny))
    row, upper = (torch.empty((q, parts, room), dtype=t, device=device) for t in (torch.int32, torch.float32))
    listed = torch.empty((q, parts), dtype=torch.int32, device=device)
    needed = torch.where(settled, torch.inf, -torch.inf)
    for last in (False, True):
        lowest = torch.empty((q, parts, slots), dtype=torch.float32, device=device)
        sieve[(programs,)](
            *interpretable(x, rows[0]), x_scale, x_norm, x_rest, x_error, *rows[1:],
            needed, lowest, upper, row, listed, q, m, d, x.stride(0), rows[0].stride(0),
            share, launch.columns * (1 if last else STRIDE), k, blocks, parts, room, gamma, tiny,
            last, slots, launch.rows, launch.columns, launch.depth, **launch.options,
        )  # fmt: skip
        needed = lowest[:, :, :k].flatten(1).topk(k, dim=1).values[:, -1].contiguous()
    return Lists(row, upper, listed, needed - x_error)


def decide_listed(
    queries: Tensor, rows: Tensor, factors: tuple[Tensor, ...], lists: Lists, at: Tensor, k: int, metric: int
) -> tuple[Tensor, Tensor]:
    """Decide what is needed of the lists: keys (Q, parts · SLOTS), some of no row, and counts (Q,).

    The rows lie `at` (Q, parts, room), and factors are those of queries and of all rows by number.
    """
    q, parts, room = lists.row.shape
    slots = triton.next_power_of_2(k)
    keys = torch.full((q, parts, slots), NONE.value, dtype=torch.int64, device=queries.device)
    used = torch.empty((q, parts), dtype=torch.int32, device=queries.device)
    rescore[(q, parts)](
        *interpretable(queries, rows), *factors, lists.needed, lists.upper, lists.row, at, lists.listed,
        keys, used, queries.shape[1], queries.stride(0), rows.stride(0), k, parts, room,
        metric, slots, CHUNK, DECIDE_DEPTH, **DECIDE_FEW_OPTIONS,
    )  # fmt: skip
    return keys.flatten(1), used.sum(1)


def decide_all(
    queries: Tensor,
    rows: Tensor,
    factors: tuple[Tensor, ...],
    wanted: Tensor,
    k: int,
    metric: int,
    offset: int,
) -> Tensor:
    """Decide all rows, numbered from `offset`, for queries that are wanted (Q,): keys (Q, parts · SLOTS)."""
    q, m = queries.shape[0], rows.shape[0]
    slots = triton.next_power_of_2(k)
    share = triton.cdiv(triton.cdiv(m, CHUNK), PARTS) * CHUNK
    parts = triton.cdiv(m, share)
    keys = torch.full((q, parts, slots), NONE.value, dtype=torch.int64, device=queries.device)
    exhaust[(q, parts)](
        *interpretable(queries, rows), *factors, wanted.to(torch.int32), keys, m, offset,
        queries.shape[1], queries.stride(0), rows.stride(0), share, k, parts,
        metric, slots, CHUNK, DECIDE_DEPTH, **DECIDE_FEW_OPTIONS,
    )  # fmt: skip
    return keys.flatten(1)


def variants() -> list[Variant]:
    """List the ways in which the launchers call their kernels: fewest and most neighbors."""
    factor, key, number, size, whole = "*fp32:16", "*i64:16", "*i32:16", "i32", "i32:16"
    found = []
    queries = dict.fromkeys(("query_scale", "query_norm", "query_rest", "query_error"), factor)
    columns = dict.fromkeys(("scale", "norm", "rest", "half", "start_from", "lowest", "upper_of"), factor)
    of_both = dict.fromkeys(("query_first", "query_second", "first", "second"), factor)
    for dtype, name in ((torch.int8, "i8"), (torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        signature = {"queries": f"*{name}:16", "codes": f"*{name}:16", **queries, **columns}
        signature |= {"row_of": number, "listed": number, "q": size, "m": size, "d": whole}
        signature |= dict.fromkeys(("query_stride", "codes_stride", "share", "step"), whole)
        signature |= dict.fromkeys(("k", "blocks", "parts"), size)
        signature |= {"room": whole, "gamma": "fp32", "tiny": "fp32"}
        launch = SIEVES[dtype]
        for k, last in ((1, False), (1, True), (MAX_K, False), (MAX_K, True)):
            constants = {"LIST": last, "SLOTS": k}
            label = f"knn_topk_coded.sieve {name} k={k}{' list' if last else ''}"
            found.append(launch.variant(label, sieve, signature, constants))
    for name in ("bf16", "fp32"):
        both = {
            "queries": "*fp32:16",
            "rows": f"*{name}:16",
            **of_both,
            "keys": key,
            "parts": size,
            "k": size,
        }
        both |= {"d": whole, "query_stride": whole, "rows_stride": whole}
        constants = {"METRIC": 0, "SLOTS": MAX_K, "CHUNK": CHUNK, "DEPTH": DECIDE_DEPTH}
        signature = both | {"needed": factor, "upper_of": factor, "row_of": number, "at_of": number}
        signature |= {"listed": number, "used": number, "room": whole}
        found.append(
            Variant(f"knn_topk_coded.rescore {name}", rescore, signature, constants, DECIDE_FEW_OPTIONS)
        )
        signature = both | {"wanted": number, "m": size, "offset": whole, "share": whole}
        found.append(
            Variant(f"knn_topk_coded.exhaust {name}", exhaust, signature, constants, DECIDE_FEW_OPTIONS)
        )
    return found
