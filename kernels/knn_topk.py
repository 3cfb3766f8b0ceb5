"""knn_topk: persistent programs scan the bank and keep k candidates a query; a second kernel decides."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dinofast.kernels.schedule import Launch, schedule
from dinofast.kernels.tile import (
    DTYPES,
    OPTIONS,
    Variant,
    cosines,
    far_scaled,
    interpretable,
    load_rows,
    ordered,
    peak_factor,
    products,
    scale_factors,
    scales_of,
)
from torch import Tensor

MAX_K = 64
_FEW, _MANY = {**OPTIONS, "maxnreg": 128}, {**OPTIONS, "num_stages": 2, "maxnreg": 168}
_WIDE = {**OPTIONS, "num_stages": 4}
LAUNCHES = {
    (torch.float32, False): Launch(32, 64, 16, 2, _FEW),
    (torch.float32, True): Launch(32, 64, 16, 1, _MANY),
    (torch.bfloat16, False): Launch(128, 128, 32, 1, _WIDE),
    (torch.bfloat16, True): Launch(64, 64, 64, 1, OPTIONS),
    (torch.float16, False): Launch(128, 128, 32, 1, _WIDE),
    (torch.float16, True): Launch(64, 64, 64, 1, OPTIONS),
}
"""(dtype, more than one neighbor) -> the launch of `scan`; none spills a register by Triton 3.9.
A tile has at least MAX_K columns, so that only the last part may have fewer than k rows."""
NORM_ROWS, NORM_DEPTH = 16, 128
DECIDE_DEPTH = 64
DECIDE_OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
MERGED = 512
"""Keys of all parts that `decide` looks at together."""
NONE = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # the key of no row
COSINE, EUCLIDEAN, SQEUCLIDEAN = (tl.constexpr(i) for i in range(3))


@triton.jit
def square_norms(rows, n, d, stride, norms, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Sum the squares of every row; NaN for a row with NaN or inf."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    broken = tl.zeros((ROWS,), tl.int32)
    for start in range(0, d, DEPTH):
        x = load_rows(rows, row, start + tl.arange(0, DEPTH), n, d, stride).to(tl.float32)
        broken = tl.maximum(broken, tl.max((~(tl.abs(x) < float("inf"))).to(tl.int32), 1))
        total += tl.sum(x * x, 1)
    tl.store(norms + row, tl.where(broken > 0, float("nan"), total), mask=row < n)


@triton.jit
def gaps(
    queries, bank, row, column, q, m, d, query_stride, bank_stride, squares_of_query,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Give the squared distances of a tile of queries to one of the bank, whose rows are read once.

    NaN for a row with NaN or inf; where squares overflow, which of the two it was is read again.
    """
    product, squares = products(
        queries, bank, row, column, q, m, d, query_stride, bank_stride, squares_of_query, squares_of_query,
        False, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    if tl.max((~(squares < float("inf"))).to(tl.int32), 0) > 0:
        factor = peak_factor(bank, column, m, d, bank_stride, COLUMNS, DEPTH)
        squares = tl.where(factor == factor, squares, float("nan"))
    return squares[None, :] - 2 * product + squares_of_query[:, None]


@triton.jit
def scan(
    queries, bank, query_first, query_second, keys,
    q, m, d, query_stride, bank_stride, share, k, blocks, parts,
    COSINE: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Keep the k nearest of `share` bank rows for ROWS queries, by the expanded form, item after item.

    A key is the ordered code of a distance above the row's number, so keys order as (distance, row) do. For
    cosine, first and second are the factors of `row_scales`; otherwise second is the squared norm.
    Fills keys (q, parts, SLOTS); what lies beyond k, and k beyond the part's rows, is not a row's key.
    """
    for item in tl.range(tl.program_id(0), blocks * parts, tl.num_programs(0)):
        part = item // blocks
        row = item % blocks * ROWS + tl.arange(0, ROWS)
        begin = part * share
        end = tl.minimum(begin + share, m)
        first = tl.load(query_first + row, mask=row < q, other=0.0)
        second = tl.load(query_second + row, mask=row < q, other=0.0)
        far = far_scaled(first, second)
        slot = tl.zeros((ROWS, SLOTS), tl.int64) + tl.arange(0, SLOTS)[None, :]
        empty = slot + (0x7FFFFFFF << 32)
        kept = tl.where(slot < k, empty, -0x8000000000000000)
        worst = tl.max(kept, 1)
        for start in range(begin, end, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            if COSINE:
                gap = -cosines(
                    queries, bank, row, column, q, end, d, query_stride, bank_stride, first, second, far,
                    ROWS, COLUMNS, DEPTH,
                )  # fmt: skip
            else:
                gap = gaps(
                    queries, bank, row, column, q, end, d, query_stride, bank_stride, second,
                    ROWS, COLUMNS, DEPTH,
                )  # fmt: skip
            code = tl.where((column < end)[None, :], ordered(gap), 0x7FFFFFFF)
            least = tl.min(code, 1)
            if SLOTS == 1:
                at = tl.min(tl.where(code == least[:, None], column[None, :], 0x7FFFFFFF), 1)
                worst = tl.minimum(worst, (least.to(tl.int64) << 32) + at)
            else:
                enters = least < (worst >> 32).to(tl.int32)
                while tl.max(enters.to(tl.int32), 0) > 0:
                    at = tl.min(tl.where(code == least[:, None], column[None, :], 0x7FFFFFFF), 1)
                    key = (least.to(tl.int64) << 32) + at
                    out = enters[:, None] & (kept == worst[:, None])
                    kept = tl.where(out, key[:, None], kept)
                    worst = tl.max(kept, 1)
                    code = tl.where(column[None, :] == at[:, None], 0x7FFFFFFF, code)
                    least = tl.min(code, 1)
                    enters = least < (worst >> 32).to(tl.int32)
        if SLOTS == 1:
            kept = worst[:, None]
        place = (row.to(tl.int64)[:, None] * parts + part) * SLOTS + tl.arange(0, SLOTS)[None, :]
        tl.store(keys + place, kept, mask=(row < q)[:, None])


@triton.jit
def empty_keys(slot, k):
    """Give k keys of no row, none twice; the slots beyond them never give way."""
    return tl.where(slot < k, NONE - slot.to(tl.int64), -0x8000000000000000)


@triton.jit
def keep_least(kept, worst, key, SLOTS: tl.constexpr):
    """Put the keys that are less than the largest kept (SLOTS,) in the places of those."""
    least = tl.min(key, 0)
    while least < worst:
        kept = tl.where(kept == worst, least, kept)
        key = tl.where(key == least, NONE, key)
        worst = tl.max(kept, 0)
        least = tl.min(key, 0)
    return kept, worst


@triton.jit
def direct(
    queries, rows, row, at, present, query_first, query_second, first, second,
    d, query_stride, rows_stride, METRIC: tl.constexpr, SLOTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Give the distances (SLOTS,) of a query to the rows that lie `at`, whose factors are first and second.

    The sum is taken in one order, whatever the layout: over steps of DEPTH channels, then by halves; so
    kernels that call this without floating-point fusion agree bit for bit.
    """
    squares = tl.zeros((SLOTS, DEPTH), tl.float32)
    for depth in range(0, d, DEPTH):
        channel = depth + tl.arange(0, DEPTH)
        x = tl.load(queries + row * query_stride + channel, mask=channel < d, other=0.0).to(tl.float32)
        inside = present[:, None] & (channel < d)[None, :]
        y = tl.load(rows + at[:, None] * rows_stride + channel[None, :], mask=inside, other=0.0)
        y = y.to(tl.float32)
        if METRIC == COSINE:
            x = x * tl.load(query_first + row) * tl.load(query_second + row)
            y = y * first[:, None] * second[:, None]
        gap = x[None, :] - y
        squares += gap * gap
    for halving in tl.static_range(6):  # DEPTH is 64
        left, right = tl.split(tl.reshape(squares, (SLOTS, DEPTH >> (halving + 1), 2)))
        squares = left + right
    total = tl.reshape(squares, (SLOTS,))
    if METRIC == COSINE:
        unit = second * tl.load(query_second + row) != 0
        total = tl.minimum(tl.where(unit, total * 0.5, 1.0), 2.0)
    if METRIC == EUCLIDEAN:
        total = tl.sqrt_rn(total)
    return total


@triton.jit
def decide(
    queries, bank, query_first, query_second, keys, distance, index,
    m, d, query_stride, bank_stride, k, parts,
    METRIC: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Take one query's k smallest keys of all parts and order them by the direct difference, then by row."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    kept = empty_keys(slot, k)
    worst = tl.max(kept, 0)
    for start in range(0, parts * SLOTS, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        used = (entry < parts * SLOTS) & (entry % SLOTS < k)
        key = tl.load(keys + row * parts * SLOTS + entry, mask=used, other=NONE)
        kept, worst = keep_least(kept, worst, key, SLOTS)
    present = slot < k
    broken = tl.min(tl.where(present, kept, NONE), 0) >> 32 == -0x80000000
    chosen = tl.where(present, kept & 0x7FFFFFFF, m)
    first = tl.full((SLOTS,), 1.0, tl.float32)
    second = first
    if METRIC == COSINE:
        first, second = scales_of(bank, chosen, m, d, bank_stride, SLOTS, DEPTH)
    total = direct(
        queries, bank, row, chosen, present, query_first, query_second, first, second,
        d, query_stride, bank_stride, METRIC, SLOTS, DEPTH,
    )  # fmt: skip
    final = tl.where(present, (ordered(total).to(tl.int64) << 32) + chosen, NONE)
    rank = tl.sum((final[None, :] < final[:, None]).to(tl.int32), 1)
    rank = tl.where(broken, slot, rank)
    place = row * k + rank
    tl.store(distance + place, tl.where(broken, float("nan"), total), mask=present)
    tl.store(index + place, tl.where(broken, slot.to(tl.int64), chosen), mask=present)


def knn_topk(queries: Tensor, bank: Tensor, k: int, metric: int, distance: Tensor, index: Tensor) -> None:
    """Fill distance (Q, k) float32 and index (Q, k) int64; channels must be contiguous, rows may be strided.

    Metrics are 0, 1, 2 in the operator's order; k <= MAX_K and M < 2**31 - 128.
    """
    (q, d), m = queries.shape, bank.shape[0]
    if q == 0:
        return
    queries, bank = interpretable(queries, bank)
    factors = scale_factors(queries) if metric == COSINE.value else (_square_norms(queries),) * 2
    slots = triton.next_power_of_2(k)
    launch = LAUNCHES[queries.dtype, k > 1]
    programs, blocks, parts, share = schedule(queries.device, launch, q, m)
    keys = torch.empty((q, parts, slots), dtype=torch.int64, device=queries.device)
    strides = queries.stride(0), bank.stride(0)
    scan[(programs,)](
        queries, bank, *factors, keys, q, m, d, *strides, share, k, blocks, parts,
        metric == COSINE.value, slots, launch.rows, launch.columns, launch.depth, **launch.options,
    )  # fmt: skip
    decide[(q,)](
        queries, bank, *factors, keys, distance, index, m, d, *strides, k, parts,
        metric, slots, MERGED, DECIDE_DEPTH, **DECIDE_OPTIONS,
    )  # fmt: skip


def _square_norms(rows: Tensor) -> Tensor:
    norms = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    square_norms[(triton.cdiv(rows.shape[0], NORM_ROWS),)](
        rows, *rows.shape, rows.stride(0), norms, NORM_ROWS, NORM_DEPTH, **OPTIONS
    )
    return norms


def variants() -> list[Variant]:
    """List the ways in which the launcher calls its kernels: fewest, some and most neighbors."""
    factor, key, size, whole = "*fp32:16", "*i64:16", "i32", "i32:16"
    found = []
    for dtype, name in DTYPES.items():
        rows = f"*{name}:16"
        sizes = {"d": whole, "query_stride": whole, "bank_stride": whole, "k": size, "parts": size}
        signature = {"rows": rows, "n": size, "d": whole, "stride": whole, "norms": factor}
        constants = {"ROWS": NORM_ROWS, "DEPTH": NORM_DEPTH}
        found.append(Variant(f"knn_topk.square_norms {name}", square_norms, signature, constants, OPTIONS))
        both = {"queries": rows, "bank": rows, "query_first": factor, "query_second": factor, "keys": key}
        both |= {"m": size, **sizes}
        scanned = both | {"q": size, "share": whole, "blocks": size}
        for k, metric in ((1, 0), (1, 2), (4, 1), (MAX_K, 0), (MAX_K, 2)):
            label = f"{name} k={k} {('cosine', 'euclidean', 'sqeuclidean')[metric]}"
            launch = LAUNCHES[dtype, k > 1]
            constants = {"COSINE": int(metric == 0), "SLOTS": k}
            found.append(launch.variant(f"knn_topk.scan {label}", scan, scanned, constants))
        decided = both | {"distance": factor, "index": key}
        for k in (1, MAX_K):
            constants = {"METRIC": 0, "SLOTS": k, "CHUNK": MERGED, "DEPTH": DECIDE_DEPTH}
            label = f"knn_topk.decide {name} k={k}"
            found.append(Variant(label, decide, decided, constants, DECIDE_OPTIONS))
    return found
