"""Rows behind codes for a GPU: a scan of the codes proposes within a proven bound, float32 decides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinofast.errors import InputError
from dinofast.ops import providers
from dinofast.ops.knn_topk import METRICS
from dinofast.ops.mapped_rows import search_blocks
from dinofast.ops.registry import is_static
from dinofast.ops.rows import require

MOST_K = 64
MOST_ROWS = 1 << 30
MOST_D = 1 << 17  # channels whose products of codes, 127² each, cannot overflow int32
CODED = 1 << 22  # elements that are coded at a time
QUERIES, NEIGHBORS = 2048, 1 << 15  # at most, that are searched for at a time
GATHERED = 1 << 16  # rows that are fetched from the host at a time
UP = 1 + 1e-6  # above what rounding a float64 to float32 can take away
NO_KEY = (1 << 63) - 1
LEAST, MOST = 2.0**-60, 2.0**60  # norms whose squares and products stay within float32


class Codes(NamedTuple):
    """Coded rows, N at a time: row ≈ scale · codes.

    Attributes:
        codes: (N, D), int8, bfloat16 or float32.
        scale: (N,), float32.
        norm: (N,), float32: no row is longer; inf for a row whose scores are not known at all.
        rest: (N,), float32: no row is farther from scale · codes.
        half: (N,), float32: half the squared norm; for cosine, a zero row has 1/2 more.
    """

    codes: Tensor
    scale: Tensor
    norm: Tensor
    rest: Tensor
    half: Tensor

    @classmethod
    def empty(cls, codes: Tensor) -> Codes:
        """Make room for what belongs to the codes."""
        shape, device = (codes.shape[0],), codes.device
        return cls(codes, *(torch.empty(shape, device=device) for _ in range(4)))


def rounding(d: int) -> tuple[float, float]:
    """Bound what rounding adds to a score, as (gamma, tiny): gamma (|x|² + |y|²) + 2 tiny.

    With u = 2**-24: a tensor core may lose 4 u of the sum of magnitudes at each of D additions, which is
    2 D u (|x|² + |y|²). The rest, 70 u + D u, covers scaling and subtracting, squared norms, the centering of
    both rows, the direct difference, the rounding of its root, and unit norms that are 2**-21 off. `tiny` is
    above what D underflows can lose.

    References:
        Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., chapter 3.
    """
    return 4 * (d + 64) * 2.0**-24, (d + 64) * 2.0**-125


def encode(
    rows: Tensor, factors: tuple[Tensor, Tensor] | None, center: Tensor | None, kind: torch.dtype, own: bool
) -> Codes:
    """Code rows, each times both its factors and less the center.

    Args:
        rows: (N, D), floating point, finite.
        factors: two of (N,), float32, as `kernels.tile.row_scales` gives them, or None.
        center: (D,), float32, or None.
        kind: int8, bfloat16 or float32.
        own: rows, which are of that kind and have no center, are their own codes.
    """
    x = rows.float()
    scale = torch.ones(len(rows), device=rows.device)
    zero = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    if factors is not None:
        scale, zero = factors[0] * factors[1], factors[1] == 0
        x = x * factors[0][:, None] * factors[1][:, None]
    if center is not None:
        x = x - center
    if kind == torch.int8:
        peak = x.abs().amax(1)
        scale = torch.where((peak > 1e-30) & (peak < 1e30), peak / 127, 0.0)
        codes = (x / torch.where(scale > 0, scale, 1.0)[:, None]).round().clamp(-127, 127)
        codes = torch.where(scale[:, None] > 0, codes, 0.0).to(torch.int8)
    elif own:
        codes = rows
    else:
        codes, scale = x.to(kind), torch.ones_like(scale)
    wide = x.double()
    square = wide.square().sum(1)
    norm = square.sqrt() * UP
    rest = (wide - codes.double() * scale.double()[:, None]).norm(dim=1) * UP
    length = codes.double().norm(dim=1)
    known = (norm < MOST) & rest.isfinite() & (length < MOST) & ((length > LEAST) | (length == 0))
    known &= scale.isfinite()
    return Codes(
        codes,
        torch.where(known, scale, 0.0),
        torch.where(known, norm, torch.inf).float(),
        torch.where(known, rest, 0.0).float(),
        torch.where(known, square / 2 + zero * 0.5, 0.0).float(),
    )


def choose_codes(rows: Tensor, wanted: str, device: torch.device, few: int) -> tuple[str, str, torch.dtype]:
    """Choose the strategy of a `Bank` on a device, why if it is not the one wanted, and the codes.

    Raises:
        InputError: no codes serve so many rows or channels.
    """
    m, d = rows.shape
    if m > MOST_ROWS or d > MOST_D:
        raise InputError(f"Bank: a GPU searches at most {MOST_ROWS} rows of {MOST_D} channels, got {(m, d)}")
    half, here = rows.dtype == torch.bfloat16, rows.device == device
    if wanted == "lowp" or (wanted == "auto" and (half or not here or m >= few)):
        reason = "" if wanted == "lowp" else f"{m} rows of {rows.dtype} on {rows.device} are scanned in short"
        return "lowp", reason, torch.bfloat16 if half and here else torch.int8
    reasons = {"float32": "", "auto": f"the bank has fewer than {few} rows"}
    return "float32", reasons.get(wanted, f"{wanted!r} runs on the CPU only"), torch.float32


def coded_bytes(m: int, d: int, kind: torch.dtype, metric: str, own: bool) -> int:
    """Tell the bytes of `CodedRows.prepared`; `own` as for `encode`."""
    numbers = 4 + 2 * (metric == "cosine")  # scale, norm, rest, half; and factors
    return 4 * numbers * m + (0 if own else m * d * kind.itemsize + 4 * d)


class CodedRows:
    """Search rows by their codes.

    Every row that may be among the k nearest is listed and decided by the direct difference in float32; a
    query whose list has no room for all of them is decided against all rows. So the result is the k smallest
    of all (distance, index), bit for bit the same whatever the codes are.

    Args:
        rows: (M, D), float32 or bfloat16, finite, contiguous channels; on the device or, with int8 codes, on
            the host, from where candidates are gathered. Kept, not copied.
        metric: of `knn_topk.METRICS`.
        kind: of the codes: int8, or the dtype of rows, which are their own codes then.
        device: that searches.

    Attributes:
        rows: as given.
        codes: of the rows, on the device.
        used: of the last search, (Q,) int64: candidates decided for every query; M where all rows were.
    """

    def __init__(self, rows: Tensor, metric: str, kind: torch.dtype, device: torch.device) -> None:
        self.rows, self.metric, self.device = rows, metric, device
        self.used = torch.zeros(0, dtype=torch.int64, device=device)
        self._gathers = rows.device != device
        m, d = rows.shape
        own = kind == rows.dtype and rows.device == device
        self._center = None if own else self._middle()
        self.codes = Codes.empty(rows if own else torch.empty((m, d), dtype=kind, device=device))
        self.factors = tuple(torch.empty(m, device=device) for _ in range(2 * (metric == "cosine")))
        for start, block in self._blocks():
            part = slice(start, start + len(block))
            factors = self._factors(block)
            for into, found in zip(self.factors, factors or (), strict=True):
                into[part] = found
            coded = encode(block, factors, self._center, kind, own)
            for into, found in zip(self.codes[own:], coded[own:], strict=True):
                into[part] = found

    @property
    def prepared(self) -> list[Tensor]:
        """What is held besides the rows."""
        held = [*self.codes, *self.factors, *([] if self._center is None else [self._center])]
        return [x for x in held if x is not self.rows]

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        step = max(1, CODED // self.rows.shape[1])
        for start in range(0, len(self.rows), step):
            yield start, self.rows[start : start + step].to(self.device).contiguous()

    def _factors(self, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        return providers.unit_factors(rows) if self.metric == "cosine" else None

    def _middle(self) -> Tensor:
        """Average some rows, as they are compared."""
        some = self.rows[:: max(1, len(self.rows) // 1024)].to(self.device)
        factors = self._factors(some)
        center = encode(some, factors, None, torch.float32, False).codes.double().mean(0).float()
        return torch.where(center.isfinite(), center, 0.0)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Answer `knn_topk` for queries (Q, D).

        On a GPU nothing waits where rows are there too. Rows on the host are gathered by the host, which has
        to know the candidates: such a search waits for the device once for each 65536 of them.

        Raises:
            InputError: the rows are on the host, and a recorded graph, or one to be, may not wait for it.
            RuntimeError: see `knn_topk`.
        """
        if self._gathers and is_static():
            raise InputError(
                f"Bank: cannot be captured: its rows are on {self.rows.device}, from where the host gathers "
                f"candidates for {self.device}, and a recorded graph cannot wait for it; make the Bank of "
                "rows on the GPU, or search without a graph."
            )
        (m, d), metric = self.rows.shape, self.metric
        shape, kind = tuple(queries.shape), queries.dtype
        require(queries.dim() == 2 and shape[-1] == d, lambda: f"knn_topk: queries {shape}, bank {(m, d)}")
        require(queries.is_floating_point(), lambda: f"knn_topk: queries must be floating point, got {kind}")
        require(1 <= k <= m, lambda: f"knn_topk: k must be in 1 .. {m}, the bank's rows, got {k}")
        require(
            not (queries.requires_grad and torch.is_grad_enabled()),
            lambda: "knn_topk: a bank has no gradient, and queries require grad; detach them",
        )
        if queries.device != self.device:
            raise RuntimeError(f"knn_topk: device differs, queries {queries.device} and bank {self.device}")
        kernels = providers.coded_kernels(self.device)
        if kernels is None or shape[0] == 0 or k > MOST_K or kind == torch.float64:
            self.used = torch.full((shape[0],), m, device=self.device)
            return search_blocks(queries, self.rows, k, metric)
        blocks = torch.split(queries.float(), min(QUERIES, NEIGHBORS // k))
        found = [self._search(kernels, block, k) for block in blocks]
        distance, index, self.used = (torch.cat(x) for x in zip(*found, strict=True))
        return distance, index

    def _search(self, kernels: Any, x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        broken = ~x.isfinite().all(1)
        x = torch.where(broken[:, None], 0.0, x)
        factors = self._factors(x)
        zero = torch.zeros_like(broken) if factors is None else factors[1] == 0
        coded = encode(x, factors, self._center, self.codes.codes.dtype, False)
        settled = broken | zero
        with providers.on(x):
            lists = kernels.list_rows(coded, self.codes, k, settled, *rounding(x.shape[1]))
        full = (lists.listed > lists.row.shape[2]).any(1)
        everything = (*(factors or (coded.norm, coded.norm)), *(self.factors or (self.codes.norm,) * 2))
        decide = self._decide_from_host if self._gathers else self._decide_here
        keys, used = decide(kernels, x, everything, lists, full, k)
        key = keys.topk(k, dim=1, largest=False).values
        distance, index = (key >> 32).to(torch.int32).view(torch.float32), key & 0x7FFFFFFF
        first = torch.arange(k, device=x.device)
        distance = distance.masked_fill(zero[:, None], 1.0).masked_fill(broken[:, None], torch.nan)
        used = torch.where(full, len(self.rows), used)
        return distance, torch.where(settled[:, None], first, index), used

    def _decide_here(
        self, kernels: Any, x: Tensor, factors: tuple[Tensor, ...], lists: Any, full: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        metric = METRICS.index(self.metric)
        with providers.on(x):
            keys, used = kernels.decide_listed(x, self.rows, factors, lists, lists.row, k, metric)
            every = kernels.decide_all(x, self.rows, factors, full, k, metric, 0)
        keys = torch.where(full[:, None], NO_KEY, keys)
        return torch.cat([keys, every], 1), used

    def _decide_from_host(
        self, kernels: Any, x: Tensor, factors: tuple[Tensor, ...], lists: Any, full: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Gather what is listed from the host, some queries at a time; stream all rows for full lists."""
        metric = METRICS.index(self.metric)
        lists = lists._replace(listed=torch.where(full[:, None], 0, lists.listed))
        entry = torch.arange(lists.row.shape[2], device=x.device)
        wanted = (entry < lists.listed[:, :, None]) & ~(lists.upper < lists.needed[:, None, None])
        keys, used = [], []
        for part in _slices(wanted.sum((1, 2)).tolist()):
            row, inverse = torch.unique(lists.row[part][wanted[part]], return_inverse=True)
            rows = self.rows[row.to(self.rows.device, torch.int64)].to(x.device)
            at = torch.zeros_like(lists.row[part])
            at[wanted[part]] = inverse.to(at.dtype)
            some = type(lists)(*(field[part] for field in lists))
            of_both = (*(factor[part] for factor in factors[:2]), *factors[2:])
            with providers.on(x):
                found = kernels.decide_listed(x[part], rows, of_both, some, at, k, metric)
            keys.append(found[0].topk(k, dim=1, largest=False).values)
            used.append(found[1])
        best = torch.cat(keys)
        if bool(full.any()):
            best[full] = self._decide_streamed(
                kernels, x[full], [f[full] for f in factors[:2]], factors[2:], k
            )
        return best, torch.cat(used)

    def _decide_streamed(
        self, kernels: Any, x: Tensor, of_query: list[Tensor], of_row: tuple[Tensor, ...], k: int
    ) -> Tensor:
        best = torch.full((len(x), k), NO_KEY, device=x.device)
        every = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for start, block in self._blocks():
            of_both = (*of_query, *(factor[start:] for factor in of_row))
            with providers.on(x):
                metric = METRICS.index(self.metric)
                keys = kernels.decide_all(x, block, of_both, every, k, metric, start)
            best = torch.cat([best, keys], 1).topk(k, dim=1, largest=False).values
        return best


def _slices(counts: list[int]) -> Iterator[slice]:
    """Cut queries so that each slice has at most GATHERED candidates, or one query."""
    start = total = 0
    for i, count in enumerate(counts):
        if total + count > GATHERED and i > start:
            yield slice(start, i)
            start, total = i, 0
        total += count
    if counts:
        yield slice(start, len(counts))
