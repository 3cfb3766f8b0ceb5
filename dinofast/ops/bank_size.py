"""What a Bank will hold, and take while it is made: told before, from sizes and a sample of its rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dinofast.errors import InputError
from dinofast.ops import providers
from dinofast.ops.bank import FEW, STRATEGIES
from dinofast.ops.bank_choice import grouped_search, worthwhile
from dinofast.ops.bank_forms import SAMPLE, form_bytes, group, group_count, pack
from dinofast.ops.bank_rows import check_prepared
from dinofast.ops.coded_rows import choose_codes, coded_bytes
from dinofast.ops.knn_topk import METRICS, knn_workspace

SAMPLED = 1 << 14
"""Rows that tell whether groups pay; a bank of no more is told exactly."""


def bank_bytes(
    m: int,
    d: int,
    metric: str = "cosine",
    strategy: str = "auto",
    dtype: torch.dtype = torch.float32,
    rows_on: str = "cpu",
    device: str | None = None,
    grouped: bool = True,
) -> dict[str, int]:
    """Tell `Bank.nbytes_by_device` before there is a bank, within a tenth; nothing is computed.

    Args:
        m: rows.
        d: channels.
        metric: as for `Bank`.
        strategy: as for `Bank`.
        dtype: of the rows that it is made of, float32, bfloat16 or float16.
        rows_on: "cpu" or "cuda", where those are.
        device: "cpu" or "cuda", that searches; by default where the rows are. A GPU is taken to have Triton.
        grouped: whether "auto" on the CPU finds that groups pay, see `groups_pay`; they take more.

    Returns:
        Bytes that the bank holds by type of device, the rows included.

    Raises:
        InputError: unknown metric, strategy or device, rows that are no floats, no rows or channels, or more
            than a GPU searches.

    >>> bank_bytes(7_680_000, 384, dtype=torch.bfloat16, rows_on="cuda")["cuda"] / 1e9 < 6.5
    True
    """
    device = rows_on if device is None else device
    if metric not in METRICS or not {device, rows_on} <= {"cpu", "cuda"} or m < 1 or d < 1:
        raise InputError(f"bank_bytes: no Bank of {m} x {d} rows on {rows_on} by {metric!r} on {device}")
    if strategy not in STRATEGIES or not dtype.is_floating_point:
        raise InputError(f"bank_bytes: no Bank of {dtype} by strategy {strategy!r}, of {STRATEGIES}")
    if device == "cpu":
        held = 4 * m * d
        if strategy == "lowp" or (strategy == "auto" and not grouped and m >= FEW):
            held += form_bytes(m, d, False, True) if not providers.no_codes(d) and providers.has_int8() else 0
        elif strategy != "float32" and (strategy != "auto" or m >= FEW):
            held += 0 if providers.no_codes(d) else form_bytes(m, d, True, strategy != "auto")
        return {"cpu": held}
    kept = dtype if dtype == torch.bfloat16 and strategy != "float32" else torch.float32
    here = torch.device("meta")
    rows = torch.empty(m, d, dtype=kept, device=here)
    kind = choose_codes(rows, strategy, here if rows_on == device else torch.device("cuda"), FEW)[2]
    on = device if kind == torch.float32 else rows_on
    found = {on: rows.nbytes if kind != torch.float32 else 4 * m * d}
    own = kind == torch.float32 or (kind == kept and on == device)
    found[device] = found.get(device, 0) + coded_bytes(m, d, kind, metric, own)
    return found


def groups_pay(rows: Tensor, metric: str, seed: int = 0) -> bool:
    """Tell whether a `Bank` with strategy "auto" will group these rows on the CPU.

    Of more than `SAMPLED` rows so many are tried, evenly chosen, and a quarter of them. Groups pay the more
    the more rows there are: the cost is continued to all of them as a power of their number, and where that
    leaves the matter open, the answer is yes.

    Args:
        rows: (M, D), float32 on the CPU, finite, such as a mapped file; for "cosine" of unit norm.
        metric: of the bank.
        seed: of the bank.

    Raises:
        InputError: a row that is looked at holds NaN or inf, or for "cosine" is not of unit norm.
    """
    m, d = rows.shape
    if m < FEW or providers.no_codes(d):
        return False
    cost = _cost(rows, SAMPLED, metric, seed)
    if m > SAMPLED and not worthwhile(cost):
        slope = math.log(cost / _cost(rows, SAMPLED // 4, metric, seed)) / math.log(4)
        cost *= (m / SAMPLED) ** min(slope, 0.0)
    return worthwhile(cost)


def _cost(rows: Tensor, most: int, metric: str, seed: int) -> float:
    sample = rows[:: max(1, len(rows) // most)][:most] if len(rows) > most else rows
    sample = sample.cpu().contiguous()
    check_prepared(sample, metric)
    return grouped_search(pack(sample, metric, group(sample, seed), codes=False), metric)[1]


def building_bytes(m: int, d: int) -> int:
    """Tell the most that a `Bank` with strategy "auto" takes beside M rows on the CPU while it is made.

    Groups are tried before they may be found useless: k-means by a sample, the principal coordinates of
    another, then the grouped forms; or else codes are made.
    """
    if m < FEW or providers.no_codes(d):
        return 0
    count, rows = group_count(m), torch.empty(m, d, device="meta")
    means = 4 * min(m, 32 * count) * d + knn_workspace("cpu", rows, count, 1) + 12 * m + 12 * count * d
    sample = 8 * min(m, SAMPLE) * d
    coordinates = sample + max(sample, 48 * min(m, SAMPLE, d) ** 2)
    codes = form_bytes(m, d, False, True) if providers.has_int8() else 0
    return max(means, coordinates + 16 * m, form_bytes(m, d, True, False) + 16 * m, codes)
