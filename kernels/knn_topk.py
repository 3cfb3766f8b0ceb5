"""knn_topk: a scan keeps k candidates a query in registers, split over the bank; a second kernel decides."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dinofast.kernels.tile import (
    DTYPES,
    OPTIONS,
    Variant,
    interpretable,
    load_rows,
    load_scaled,
    ordered,
    scale_factors,
)
from torch import Tensor

MAX_K = 64
COLUMNS = 64
ROWS_AND_DEPTH = {torch.float32: (32, 16), torch.bfloat16: (64, 64), torch.float16: (64, 64)}
"""The largest blocks of the scan that spill no register on sm_80, 90 and 100; no GPU has compared them."""
NORM_ROWS, NORM_DEPTH = 16, 128
DECIDE_DEPTH = 64
DECIDE_OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
SPLITS = 64
"""Most parts into which the bank is split."""
PROGRAMS = 512
"""Programs that keep a large GPU busy."""
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
def scan(
    queries, bank, query_first, query_second, bank_first, bank_second, keys,
    q, m, d, query_stride, bank_stride, share, k, parts,
    COSINE: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Keep the k nearest of `share` bank rows for ROWS queries, by the expanded form.

    A key is the ordered code of a distance above the row's number, so keys order as (distance, row) do. For
    cosine, first and second are the factors of `row_scales`; otherwise second is the squared norm.
    Fills keys (q, parts, SLOTS); what lies beyond k, and k beyond the part's rows, is not a row's key.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    begin = part * share
    end = tl.minimum(begin + share, m)
    of_query = tl.load(query_second + row, mask=row < q, other=0.0)
    slot = tl.zeros((ROWS, SLOTS), tl.int64) + tl.arange(0, SLOTS)[None, :]
    empty = slot + (0x7FFFFFFF << 32)
    kept = tl.where(slot < k, empty, -0x8000000000000000)
    worst = tl.max(kept, 1)
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in range(0, d, DEPTH):
            channel = depth + tl.arange(0, DEPTH)
            if COSINE:
                x = load_scaled(queries, query_first, row, channel, q, d, query_stride)
                y = load_scaled(bank, bank_first, column, channel, end, d, bank_stride)
            else:
                x = load_rows(queries, row, channel, q, d, query_stride)
                y = load_rows(bank, column, channel, end, d, bank_stride)
            product = tl.dot(x, tl.trans(y), product, input_precision="ieee")
        of_bank = tl.load(bank_second + column, mask=column < end, other=0.0)
        if COSINE:
            gap = -(product * of_query[:, None] * of_bank[None, :])
        else:
            gap = of_bank[None, :] - 2 * product + of_query[:, None]
        code = tl.where((column < end)[None, :], ordered(gap), 0x7FFFFFFF)
        least = tl.min(code, 1)
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
    place = (row.to(tl.int64)[:, None] * parts + part) * SLOTS + tl.arange(0, SLOTS)[None, :]
    tl.store(keys + place, kept, mask=(row < q)[:, None])


@triton.jit
def direct(
    queries, bank, query_first, query_second, bank_first, bank_second, row, at, label, present,
    d, query_stride, bank_stride, METRIC: tl.constexpr, SLOTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Give the distances (SLOTS,) of a query to the bank rows that lie `at` and have the factors of `label`.

    The sum is taken in one order, whatever the layout: over steps of DEPTH channels, then by halves; so
    kernels that call this without floating-point fusion agree bit for bit.
    """
    squares = tl.zeros((SLOTS, DEPTH), tl.float32)
    for depth in range(0, d, DEPTH):
        channel = depth + tl.arange(0, DEPTH)
        x = tl.load(queries + row * query_stride + channel, mask=channel < d, other=0.0).to(tl.float32)
        inside = present[:, None] & (channel < d)[None, :]
        y = tl.load(bank + at[:, None] * bank_stride + channel[None, :], mask=inside, other=0.0)
        y = y.to(tl.float32)
        if METRIC == COSINE:
            x = x * tl.load(query_first + row) * tl.load(query_second + row)
            y = y * tl.load(bank_first + label, mask=present, other=0.0)[:, None]
            y = y * tl.load(bank_second + label, mask=present, other=0.0)[:, None]
        gap = x[None, :] - y
        squares += gap * gap
    for halving in tl.static_range(6):  # DEPTH is 64
        left, right = tl.split(tl.reshape(squares, (SLOTS, DEPTH >> (halving + 1), 2)))
        squares = left + right
    total = tl.reshape(squares, (SLOTS,))
    if METRIC == COSINE:
        unit = tl.load(bank_second + label, mask=present, other=0.0) * tl.load(query_second + row) != 0
        total = tl.minimum(tl.where(unit, total * 0.5, 1.0), 2.0)
    if METRIC == EUCLIDEAN:
        total = tl.sqrt_rn(total)
    return total


@triton.jit
def decide(
    queries, bank, query_first, query_second, bank_first, bank_second, keys, distance, index,
    d, query_stride, bank_stride, k, parts,
    METRIC: tl.constexpr, SLOTS: tl.constexpr, TOTAL: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Take one query's k smallest keys of all parts and order them by the direct difference, then by row."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, TOTAL)
    used = (entry < parts * SLOTS) & (entry % SLOTS < k)
    key = tl.load(keys + row * parts * SLOTS + entry, mask=used, other=0x7FFFFFFFFFFFFFFF)
    broken = tl.min(key, 0) >> 32 == -0x80000000
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros((SLOTS,), tl.int64)
    for i in range(k):
        least = tl.min(key, 0)
        chosen = tl.where(slot == i, least & 0x7FFFFFFF, chosen)
        key = tl.where(key == least, 0x7FFFFFFFFFFFFFFF, key)
    present = slot < k
    total = direct(
        queries, bank, query_first, query_second, bank_first, bank_second, row, chosen, chosen, present,
        d, query_stride, bank_stride, METRIC, SLOTS, DEPTH,
    )  # fmt: skip
    final = tl.where(present, (ordered(total).to(tl.int64) << 32) + chosen, 0x7FFFFFFFFFFFFFFF)
    rank = tl.sum((final[None, :] < final[:, None]).to(tl.int32), 1)
    rank = tl.where(broken, slot, rank)
    place = row * k + rank
    tl.store(distance + place, tl.where(broken, float("nan"), total), mask=present)
    tl.store(index + place, tl.where(broken, slot.to(tl.int64), chosen), mask=present)


def knn_topk(queries: Tensor, bank: Tensor, k: int, metric: int, distance: Tensor, index: Tensor) -> None:
    """Fill distance (Q, k) float32 and index (Q, k) int64; channels must be contiguous, rows may be strided.

    Metrics are 0, 1, 2 in the operator's order; k <= MAX_K and M < 2**31 - COLUMNS.
    """
    (q, d), m = queries.shape, bank.shape[0]
    if q == 0:
        return
    queries, bank = interpretable(queries, bank)
    if metric == COSINE.value:
        factors = (*scale_factors(queries), *scale_factors(bank))
    else:
        norms = [_square_norms(matrix) for matrix in (queries, bank)]
        factors = (norms[0], norms[0], norms[1], norms[1])
    rows, depth = ROWS_AND_DEPTH[queries.dtype]
    blocks, slots = triton.cdiv(q, rows), triton.next_power_of_2(k)
    parts = max(1, min(SPLITS, triton.cdiv(m, COLUMNS), PROGRAMS // blocks))
    share = triton.cdiv(triton.cdiv(m, COLUMNS), parts) * COLUMNS
    parts = triton.cdiv(m, share)
    keys = torch.empty((q, parts, slots), dtype=torch.int64, device=queries.device)
    strides = queries.stride(0), bank.stride(0)
    scan[(blocks, parts)](
        queries, bank, *factors, keys, q, m, d, *strides, share, k, parts,
        metric == COSINE.value, slots, rows, COLUMNS, depth, **OPTIONS,
    )  # fmt: skip
    decide[(q,)](
        queries, bank, *factors, keys, distance, index, d, *strides, k, parts,
        metric, slots, triton.next_power_of_2(parts * slots), DECIDE_DEPTH, **DECIDE_OPTIONS,
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
    names = ("query_first", "query_second", "bank_first", "bank_second")
    factors = dict.fromkeys(names, factor)
    found = []
    for dtype, name in DTYPES.items():
        rows = f"*{name}:16"
        sizes = {"d": whole, "query_stride": whole, "bank_stride": whole}
        signature = {"rows": rows, "n": size, "d": whole, "stride": whole, "norms": factor}
        constants = {"ROWS": NORM_ROWS, "DEPTH": NORM_DEPTH}
        found.append(Variant(f"knn_topk.square_norms {name}", square_norms, signature, constants, OPTIONS))
        both = {"queries": rows, "bank": rows, **factors, "keys": key}
        scanned = both | {"q": size, "m": size, **sizes, "share": whole, "k": size, "parts": size}
        decided = both | {"distance": factor, "index": key, **sizes, "k": size, "parts": size}
        for k, metric in ((1, 0), (4, 1), (MAX_K, 0), (MAX_K, 2)):
            label = f"{name} k={k} {('cosine', 'euclidean', 'sqeuclidean')[metric]}"
            constants = {"COSINE": int(metric == 0), "SLOTS": k}
            constants |= {"ROWS": ROWS_AND_DEPTH[dtype][0], "COLUMNS": COLUMNS}
            constants["DEPTH"] = ROWS_AND_DEPTH[dtype][1]
            found.append(Variant(f"knn_topk.scan {label}", scan, scanned, constants, OPTIONS))
        constants = {"METRIC": 0, "SLOTS": MAX_K, "TOTAL": SPLITS * MAX_K, "DEPTH": DECIDE_DEPTH}
        label = f"knn_topk.decide {name} k={MAX_K}"
        found.append(Variant(label, decide, decided, constants, DECIDE_OPTIONS))
    return found
