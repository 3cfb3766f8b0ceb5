"""A bank of rows, prepared once for many nearest-neighbor searches."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dinofast import artifact
from dinofast.errors import ArtifactError, InputError
from dinofast.ops import providers
from dinofast.ops.bank_choice import grouped_search, held_rows, knn_bank, visited_share, worthwhile
from dinofast.ops.bank_forms import group, pack
from dinofast.ops.bank_rows import check_finite, check_prepared, keep_half, prepare
from dinofast.ops.coded_rows import CodedRows, choose_codes
from dinofast.ops.knn_topk import METRICS
from dinofast.ops.mapped_rows import MappedRows
from dinofast.ops.registry import MISSING

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self

STRATEGIES = ("auto", "float32", "lowp", "pruned", "approximate")
FEW = 4096  # rows below which the automatic choice prepares nothing
PROBES = 8  # groups that an approximate search looks into


class Bank:
    """Keep rows in the forms that make searching them fast; give it to `knn_topk` in place of a tensor.

    "float32" scans all rows. "lowp" scans int8 codes, keeps every row whose score lies within the proven
    bound on the quantization error, and decides in float32. "pruned" groups the rows by k-means, skips groups
    that the triangle inequality rules out, and compares the rest by outlines first: 32, then up to 96
    principal coordinates and the norm of what they leave, which bound a product by Cauchy-Schwarz; where
    these leave much, by codes, or, if "auto" chose it, in float32: it keeps no codes of grouped rows. These
    three give the same results, bit for bit. "approximate" looks only into the groups nearest to a query and
    may miss neighbors; `recall` tells how many. "auto" takes "float32" for fewer than 4096 rows, "pruned"
    where a search for the nearest other row of 192 rows counts less than 80 % of the work of "lowp" (20 %
    without int8 instructions), else "lowp" with such instructions, else "float32".

    On a GPU, with Triton, "float32" and "lowp" scan rows there, list all that the proven bounds leave, and
    decide in float32: the same results, bit for bit, as from deciding all rows. "lowp" scans bfloat16 rows as
    they are, else int8 codes; rows on the host stay there and candidates are gathered. "auto" takes "lowp"
    for bfloat16 rows and for 4096 rows or more, else "float32". Searches wait for nothing and can be recorded
    in a CUDA graph, unless the rows are on the host.

    A bank on another device than the CPU is otherwise "float32", and so is any without the native kernels.

    Args:
        rows: (M, D), M >= 1, floating point, finite; copied and kept as float32. A `numpy.memmap` of float32
            is neither copied nor prepared: every search streams it from the file, by "float32"; it holds
            64 MiB at a time of a map that is opened for reading only. Its file must neither change nor
            shrink, and such a bank is not pickled.
        metric: "cosine", "euclidean" or "sqeuclidean", as for `knn_topk`.
        strategy: one of "auto", "float32", "lowp", "pruned", "approximate".
        seed: of the k-means that groups rows.
        adopt: keep the rows that are given, not a copy: contiguous float32, for "cosine" of unit norm to
            4e-7 or zero, as `add` leaves them; or bfloat16 where they are kept. They must not change.
        device: that searches, if it is not that of rows: a GPU, for "lowp" over rows on the host, pinned or
            memory-mapped ones too. A GPU keeps bfloat16 rows as bfloat16, unless by "float32".

    Attributes:
        metric: as given.
        strategy: the one in use.
        reason: why, where it is not the one asked for or where "auto" chose; else empty.
        build_seconds: time that preparing took, the last `add` or `remove` included.
        visited_share: of the last search, the share of rows that a query was compared with, in [0, 1]; NaN
            before the first.
        recall: of "approximate": the share of 192 rows of the bank whose nearest other row is found; else 1.

    Raises:
        InputError: rows are no matrix, not floating point, none, hold NaN or inf; unknown metric or strategy;
            the seed is no integer of 64 bits; rows to adopt are not as said there; the device has no kernels.

    >>> from dinofast.ops import knn_topk
    >>> bank = Bank(torch.eye(3))
    >>> distance, index = knn_topk(torch.tensor([[0.0, 2.0, 0.0]]), bank)
    >>> distance.item(), index.item(), len(bank), bank.strategy
    (0.0, 1, 3, 'float32')
    """

    _device: torch.device | None
    _coded: CodedRows | None

    def __init__(
        self,
        rows: Tensor | np.memmap[tuple[int, int], np.dtype[np.float32]],
        metric: str = "cosine",
        strategy: str = "auto",
        seed: int = 0,
        adopt: bool = False,
        device: str | torch.device | None = None,
    ) -> None:
        start = time.perf_counter()
        self._configure(metric, strategy, seed)
        self.mapped = not isinstance(rows, Tensor)
        self._place(rows.device if isinstance(rows, Tensor) else torch.device("cpu"), device)
        if isinstance(rows, Tensor):
            self._build(self._take(rows, adopt), start)
            return
        self._mapped = MappedRows(rows)
        if self._device is not None and device is not None:
            check_finite(self._mapped.tensor, self._mapped.next_block)
            self._build_coded(self._mapped.tensor, start)
            return
        self._device = None
        if strategy not in ("auto", "float32"):
            raise InputError(f"Bank: a memory-mapped bank is searched by 'float32', not {strategy!r}")
        check_finite(self._mapped.tensor, self._mapped.next_block)
        self._use([self._mapped.tensor], "float32", "the rows are memory-mapped", start)

    def _configure(self, metric: str, strategy: str, seed: int) -> None:
        if metric not in METRICS:
            raise InputError(f"Bank: unknown metric {metric!r}; one of {', '.join(METRICS)}")
        if strategy not in STRATEGIES:
            raise InputError(f"Bank: unknown strategy {strategy!r}; one of {', '.join(STRATEGIES)}")
        if not isinstance(seed, int) or not -(1 << 63) <= seed < 1 << 64:
            raise InputError(f"Bank: seed must be an integer of 64 bits, got {seed!r}")
        self.metric, self._wanted, self._seed = metric, strategy, seed

    def _place(self, rows: torch.device, device: str | torch.device | None) -> None:
        target = rows if device is None else torch.device(device)
        if target.type == "cuda" and target.index is None:
            target = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
        found = providers.coded_kernels(target) is not None
        if target != rows and not found:
            why = MISSING.get("triton", "another backend is forced, or it is no GPU that Triton serves")
            raise InputError(f"Bank: rows on {rows} cannot be searched on {target}: {why}")
        self._device, self._coded = target if found else None, None

    def _take(self, rows: Tensor, adopt: bool = False) -> Tensor:
        if self._device is not None and rows.dtype == torch.bfloat16 and self._wanted != "float32":
            return keep_half(rows, adopt)
        if adopt:
            check_prepared(rows, self.metric)
        return rows.detach() if adopt else prepare(rows, self.metric)

    def __getstate__(self) -> dict[str, Any]:
        if self.mapped:
            raise InputError(
                "Bank: a memory-mapped bank is not copied or pickled; open its file where it is needed: "
                "Bank(numpy.load(path, mmap_mode='r'))"
            )
        return self.__dict__

    def __len__(self) -> int:
        return self.packed[0].shape[0]

    @property
    def rows(self) -> Tensor:
        """The rows (M, D), float32; for cosine scaled to unit norm, unless memory-mapped or bfloat16."""
        return self.packed[0]

    @property
    def nbytes(self) -> int:
        """Bytes that all prepared forms take, the rows included."""
        return sum(self.nbytes_by_device.values())

    @property
    def nbytes_by_device(self) -> dict[str, int]:
        """The same for each device, such as {"cuda:0": ..., "cpu": ...}."""
        found: dict[str, int] = {}
        for x in (*self.packed, *(self._coded.prepared if self._coded is not None else [])):
            found[str(x.device)] = found.get(str(x.device), 0) + x.nbytes
        return found

    @property
    def candidates(self) -> tuple[float, float]:
        """Mean and most rows that the last search on a GPU decided for a query; NaN before, and elsewhere."""
        if self._coded is None or not len(self._coded.used):
            return float("nan"), float("nan")
        return float(self._coded.used.double().mean()), float(self._coded.used.max())

    def add(self, rows: Tensor) -> Self:
        """Append rows and prepare the bank anew.

        Args:
            rows: (N, D), N >= 1, as for the constructor; N rows get the numbers M .. M + N − 1.

        Returns:
            The bank itself; unchanged when an error is raised.

        Raises:
            InputError: as the constructor; D, device or the dtype kept differ; the bank is memory-mapped.
        """
        start = time.perf_counter()
        self._refuse_mapped("add")
        new = self._take(rows)
        if new.dtype != self.rows.dtype:
            raise InputError(f"Bank.add: the bank keeps {self.rows.dtype}, the rows are {new.dtype}")
        if new.shape[1] != self.rows.shape[1] or new.device != self.rows.device:
            raise InputError(
                f"Bank.add: the bank has D = {self.rows.shape[1]} on {self.rows.device}, "
                f"the rows D = {new.shape[1]} on {new.device}"
            )
        self._build(torch.cat([self.rows, new]), start)
        return self

    def remove(self, indices: Tensor) -> Self:
        """Take rows out and prepare the bank anew; later rows move up.

        Args:
            indices: (N,), int64, in [0, M); duplicates count once.

        Returns:
            The bank itself; unchanged when an error is raised.

        Raises:
            InputError: an index out of range or no integer; no row would be left; the bank is memory-mapped.
        """
        start = time.perf_counter()
        self._refuse_mapped("remove")
        indices = torch.as_tensor(indices, device=self.rows.device)
        if indices.is_floating_point() or indices.dtype == torch.bool or indices.dim() != 1:
            raise InputError(
                f"Bank.remove: wants row numbers (N,), got {indices.dtype} {tuple(indices.shape)}"
            )
        outside = indices[(indices < 0) | (indices >= len(self))]
        if len(outside):
            raise InputError(f"Bank.remove: row {int(outside[0])} is outside [0, {len(self)})")
        keep = torch.ones(len(self), dtype=torch.bool, device=self.rows.device)
        keep[indices.long()] = False
        if not bool(keep.any()):
            raise InputError("Bank.remove: no row would be left")
        self._build(self.rows[keep], start)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows, in float32, the metric, the strategy asked for and the seed to one file.

        Raises:
            InputError: the file cannot be written; the bank is memory-mapped, a file already.
        """
        self._refuse_mapped("save")
        config = {"metric": self.metric, "strategy": self._wanted, "seed": self._seed}
        rows = self.rows if self.rows.dtype == torch.float32 else prepare(self.rows, self.metric)
        artifact.write(path, "bank", {"rows": rows}, config)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote and prepare it for this machine; on the machine that saved: the same bank.

        Prepared forms never come from a file, since native code reads by the row numbers in them.

        Raises:
            InputError: there is no such file, or it cannot be opened.
            ArtifactError: the file is torn or holds something else.
        """
        start = time.perf_counter()
        tensors, config = artifact.read(path, "bank")
        bank = cls.__new__(cls)
        try:
            if set(tensors) != {"rows"} or set(config) != {"metric", "strategy", "seed"}:
                raise InputError(f"Bank: holds {sorted(tensors)} with {sorted(config)}")
            bank._configure(**config)
            check_prepared(tensors["rows"], bank.metric)
        except InputError as error:
            raise ArtifactError(f"{path}: not what a bank saves ({error}); save the bank again.") from error
        bank.mapped = False
        bank._place(tensors["rows"].device, None)
        bank._build(tensors["rows"], start)
        return bank

    def _refuse_mapped(self, what: str) -> None:
        if self.mapped:
            raise InputError(f"Bank.{what}: the bank is memory-mapped and never changes; change its file")

    def _use(self, packed: list[Tensor], strategy: str, reason: str, start: float) -> None:
        self.packed, self.strategy, self.reason = packed, strategy, reason
        self.visited_share, self.recall = float("nan"), 1.0
        self.build_seconds = time.perf_counter() - start

    def _build(self, rows: Tensor, start: float) -> None:
        """Prepare the forms of the wanted strategy, or of the one that `auto` finds best."""
        if self._device is not None:
            self._build_coded(rows, start)
            return
        wanted, m = self._wanted, rows.shape[0]
        reason = _no_codes(rows)
        if wanted == "lowp" and not reason and not providers.has_int8():
            reason = "this processor has no int8 instructions"
        if wanted == "auto" and not reason and m < FEW:
            reason = f"the bank has fewer than {FEW} rows"
        if wanted == "float32" or reason:
            self._use([rows], "float32", "" if wanted == "float32" else reason, start)
            return
        if wanted == "lowp":
            self._use(pack(rows, self.metric, None), "lowp", "", start)
            return
        packed = pack(rows, self.metric, group(rows, self._seed), codes=wanted != "auto")
        if wanted == "auto":
            self._choose(packed, start)
            return
        recall = self._measure_recall(packed) if wanted == "approximate" else 1.0
        self._use(packed, wanted, "", start)
        self.recall = recall

    def _build_coded(self, rows: Tensor, start: float) -> None:
        assert self._device is not None
        strategy, reason, kind = choose_codes(rows, self._wanted, self._device, FEW)
        if kind == torch.float32:
            rows = rows.to(self._device, torch.float32)
        self._coded = CodedRows(rows, self.metric, kind, self._device)
        self._use([rows], strategy, reason, start)

    def _choose(self, packed: list[Tensor], start: float) -> None:
        share, cost = grouped_search(packed, self.metric)
        if worthwhile(cost):
            self._use(packed, "pruned", f"a search visits {share:.1%} of the rows", start)
            return
        reason = f"groups and outlines rule out too little: {cost:.1%} of the work of codes would be left"
        if providers.has_int8():
            rows = packed[0]
            packed.clear()  # before the codes are made
            self._use(pack(rows, self.metric, None), "lowp", reason, start)
        else:
            self._use(packed[:1], "float32", reason, start)

    def _measure_recall(self, packed: list[Tensor]) -> float:
        queries = held_rows(packed[0])
        if len(packed[0]) == 1:  # there is no other row to be found
            return 1.0
        exact = knn_bank(queries, packed, 2, self.metric, 0)[0][:, 1]
        found = knn_bank(queries, packed, 2, self.metric, PROBES)[0][:, 1]
        return float((found <= exact).double().mean())

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Answer `knn_topk(queries, self, k)`."""
        if self._coded is not None:
            if self.mapped:
                self._mapped.next_block()
            found = self._coded.search(queries, k)
            self.visited_share = 1.0
            return found
        if self.mapped:
            found = self._mapped.search(queries, k, self.metric)
            self.visited_share = 1.0
            return found
        probes = PROBES if self.strategy == "approximate" else 0
        distance, index, visited = knn_bank(queries, self.packed, k, self.metric, probes)
        if len(queries):
            self.visited_share = min(visited_share(visited, len(self)), 1.0)
        return distance, index


def _no_codes(rows: Tensor) -> str:
    """Tell why this machine cannot search the rows by codes, or nothing."""
    if rows.device.type != "cpu":
        return f"the rows are on {rows.device}"
    return providers.no_codes(rows.shape[1])
