"""Honest times on a shared machine: a gate before, contenders in turns, the load of others noticed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import OURS
from dinofast.ops import providers
from dinofast.ops.registry import Op
from dinofast.testing import as_tuple, assert_results, cast_inputs

SAMPLE_SECONDS = 0.2
"""A sample repeats its call for this long: the kernel counts CPU time in steps of 10 ms."""

ROUNDS = (3, 11)
"""A group is sampled at least and at most this often."""

BUDGET_SECONDS = 7.0
"""Rounds beyond the least stop when a group has taken this long."""

PATIENCE_SECONDS = 8.0
"""Disturbed samples are taken again until a group has spent this long on it."""

QUIET = 0.07
"""Largest share of our cores that others may take during a sample: twice what counting in steps can err."""

SLOWDOWN = float(os.environ.get("DINOFAST_BENCH_SLOWDOWN", 1.0))
"""By how much contenders of our own are made slower: above 1 shows whether `bench.compare` notices."""

PEER_TOLERANCE = 1e-4
"""What a peer may err, relative to 1 + |truth|; kernels of our own are held to `dinofast.testing`."""

CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


class Gate:
    """The truth of one operator on one tuple of arguments, and whether results reach it.

    Args:
        op: the operator.
        args: its arguments.
    """

    def __init__(self, op: Op, args: tuple[Any, ...]) -> None:
        self.op, self.args = op, args
        self.truth = as_tuple(op.reference(*cast_inputs(op, args, torch.float64)))
        self.yardstick = as_tuple(op.reference(*args))

    def kernel(self, results: Sequence[Tensor]) -> float:
        """Hold a kernel's results to what the tests demand; give the largest error.

        Raises:
            AssertionError: what is wrong with which result.
        """
        assert_results(self.op, self.args, results, self.truth, self.yardstick)
        return self._error(results)

    def peer(self, results: Sequence[Tensor]) -> float:
        """Hold a peer's first results to the truth, loosely; give the largest error.

        Raises:
            AssertionError: it computes something else.
        """
        for got, true in zip(results, self.truth, strict=False):
            shape, wanted = tuple(got.shape), tuple(true.shape)
            assert shape == wanted, f"{self.op.name}: shape {shape}, expected {wanted}"
            relative = ((got.double() - true).abs() / (1 + true.abs())).max().item()
            assert relative <= PEER_TOLERANCE, f"{self.op.name}: errs by {relative:.3g}, relative"
        return self._error(results)

    def _error(self, results: Sequence[Tensor]) -> float:
        pairs = [(a, b) for a, b in zip(results, self.truth, strict=False) if b.is_floating_point()]
        return max(((got.double() - true).abs().max().item() for got, true in pairs), default=0.0)


@dataclass(frozen=True)
class Sample:
    """One timing.

    Attributes:
        seconds: of one call.
        others: share of our cores' time that other processes took meanwhile; NaN where it cannot be told.
        stages: seconds of the parts of the last call, where the contender tells.
    """

    seconds: float
    others: float
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def quiet(self) -> bool:
        """Whether nothing is known to have disturbed it."""
        return not self.others > QUIET


@dataclass(frozen=True)
class Timing:
    """The samples of one contender, in the order of the rounds."""

    samples: list[Sample]

    @property
    def disturbed(self) -> bool:
        """Whether too few samples were quiet: read the median as an upper bound."""
        return sum(s.quiet for s in self.samples) < 3

    @property
    def used(self) -> list[Sample]:
        """The quiet samples, or all where too few are quiet."""
        return [s for s in self.samples if s.quiet or self.disturbed]

    @property
    def median(self) -> float:
        """Seconds of one call."""
        return statistics.median(s.seconds for s in self.used)

    @property
    def stages(self) -> dict[str, float]:
        """Median seconds of each part of a call."""
        return {name: statistics.median(s.stages[name] for s in self.used) for name in self.samples[0].stages}


Call = Callable[[], Any]


@dataclass(frozen=True)
class Group:
    """Contenders that do the same work, each past its gate.

    Attributes:
        calls: contender -> call that is timed.
        facts: contender -> what is known of it, in JSON types.
        stages: contender -> gives the seconds of the parts of its last call; may be empty.
        timings: contender -> its samples; empty until `run`.
    """

    calls: dict[str, Call]
    facts: dict[str, dict[str, Any]]
    stages: dict[str, Callable[[], dict[str, float]]] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)

    def run(self) -> None:
        """Fill `timings`, and let go of the calls and so of their arguments."""
        self.timings.update(interleave(self.calls, self.stages))
        self.calls.clear()
        self.stages.clear()

    def ratios(self, contender: str) -> dict[str, float]:
        """Give the contender's time over that of each peer, the fastest peer first: below 1 is faster."""
        peers = {name: timing.median for name, timing in self.timings.items() if not name.startswith(OURS)}
        mine = self.timings[contender].median
        return {name: mine / peers[name] for name in sorted(peers, key=peers.__getitem__)}


Measure = Callable[[str, str, Callable[[], Group]], None]
"""The fixture: (name of the group, contender, what prepares the group) -> the contender is measured."""


def interleave(
    calls: dict[str, Call], stages: dict[str, Callable[[], dict[str, float]]]
) -> dict[str, Timing]:
    """Time calls in turns, A B C B C A C A B ..., so that what drifts drifts for all.

    Args:
        calls: contender -> call, which has run before; what it returns is dropped.
        stages: see `Group`.

    Returns:
        Contender -> its samples, one a round.
    """
    repeats = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(SAMPLE_SECONDS / (time.perf_counter() - start)))

    def sample(name: str) -> Sample:
        taken = take(calls[name], repeats[name], SLOWDOWN if name.startswith(OURS) else 1.0)
        return replace(taken, stages=dict(stages[name]())) if name in stages else taken

    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    names, start, again = list(calls), time.perf_counter(), 0.0
    for number in range(ROUNDS[1]):
        spent = time.perf_counter() - start - again
        if number >= ROUNDS[0] and spent * (number + 1) / number > BUDGET_SECONDS:
            break
        for name in names:
            best, repeat = sample(name), time.perf_counter()
            while not best.quiet and again + time.perf_counter() - repeat < PATIENCE_SECONDS:
                best = min(best, sample(name), key=lambda s: s.others)
            again += time.perf_counter() - repeat
            samples[name].append(best)
        names.append(names.pop(0))
    return {name: Timing(found) for name, found in samples.items()}


def take(call: Call, repeats: int, slowdown: float = 1.0) -> Sample:
    """Time some calls in a row, short ones after one untimed, when our own threads have come to rest.

    Args:
        call: what to time.
        repeats: how often.
        slowdown: the time is stretched by this, in a loop that does nothing.
    """
    _settle()
    if repeats > 1:
        call()
    busy, own, start = _busy(), time.process_time(), time.perf_counter()
    for _ in range(repeats):
        call()
    end = start + slowdown * (time.perf_counter() - start)
    while slowdown > 1 and time.perf_counter() < end:
        pass
    wall = time.perf_counter() - start
    others = _busy() - busy - (time.process_time() - own)
    return Sample(wall / repeats, float(np.maximum(0.0, others)) / (wall * max(1, len(CPUS))))


def _settle() -> None:
    """Wait until idle threads of the library before have stopped spinning: 5 ms in OpenMP, 26 in OpenBLAS."""
    for _ in range(40):
        own, nap = time.process_time(), 0.005
        time.sleep(nap)
        if time.process_time() - own < nap / 5:
            return


def _busy() -> float:
    """Give the CPU seconds that all processes and the hypervisor took of our cores so far; else NaN."""
    table = Path("/proc/stat")
    if not table.exists():
        return float("nan")
    ours = {f"cpu{i}" for i in CPUS}
    rows = [line.split() for line in table.read_text().splitlines()]
    ticks = [[int(t) for t in row[1:9]] for row in rows if row[0] in ours]
    return sum(sum(t) - t[3] - t[4] for t in ticks) / os.sysconf("SC_CLK_TCK")  # without idle and iowait


@dataclass(frozen=True)
class Ceiling:
    """What this machine reached in this run.

    Attributes:
        flops: float32 operations a second.
        bytes: read and written, a second.
        int8: operations a second of torch's int8 product; 0 without int8 instructions.
    """

    flops: float
    bytes: float
    int8: float = 0.0

    def or_better(self, other: Ceiling) -> Ceiling:
        """Give the best of two measurements: load on the machine can only lower them."""
        return Ceiling(max(self.flops, other.flops), max(self.bytes, other.bytes), max(self.int8, other.int8))

    def share(self, flops: int, bytes: int, seconds: float) -> float:
        """Tell how near a call comes to the time in which products or memory alone would be done."""
        return max(flops / self.flops, bytes / self.bytes) / seconds


def measure_ceiling(rounds: int = 3) -> Ceiling:
    """Measure the better of torch's and numpy's float32 product, a copy of 256 MiB, torch's int8 product."""
    side, size = 2048, 1 << 28
    a, b = torch.rand(2, side, side).unbind()
    source = torch.zeros(size, dtype=torch.uint8)
    target = torch.zeros_like(source)
    x, y = a.numpy(), b.numpy()
    codes = torch.randint(-127, 128, (side, side), dtype=torch.int8)
    works: list[Call] = [lambda: a @ b, lambda: np.dot(x, y), lambda: target.copy_(source)]
    if providers.has_int8():
        works.append(lambda: torch._int_mm(codes, codes))
    taken = [[take(work, 1).seconds for work in works] for _ in range(rounds)]
    by_torch, by_numpy, copy, *by_int8 = np.min(taken, axis=0).tolist()
    work = 2 * side**3
    return Ceiling(work / min(by_torch, by_numpy), 2 * size / copy, work / by_int8[0] if by_int8 else 0.0)
