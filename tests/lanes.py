"""A stand-in for a GPU: two lanes whose work is done late, in any order that the marks allow."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinofast.capture.recorder import Recording


@dataclass
class Mark:
    reached: bool = False


class Lanes:
    """Records by calling again; each call of the host is followed by some steps of some lanes, by a seed.

    `events` lists what the host asked for: "run" of the path aside, "record", "copy", "compute", "wait".
    """

    def __init__(self, seed: int = 0) -> None:
        self.events: list[str] = []
        self.busy = 0
        self._random = random.Random(seed)
        self._lanes: dict[str, deque[tuple[Mark, Mark | None, Callable[[], object]]]] = {
            "copy": deque(),
            "compute": deque(),
        }

    def host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    device = host

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.events.append("aside")
        yield

    def record(self, function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> Recording:
        self.events.append("record")
        outputs = tuple(x.clone() for x in function(*inputs))

        def replay() -> None:
            for held, new in zip(outputs, function(*inputs), strict=True):
                held.copy_(new)

        return Recording(outputs, replay)

    def copy(self, target: Tensor, source: Tensor) -> Mark:
        if any(not mark.reached for mark, _, _ in self._lanes["compute"]):
            self.busy += 1
        return self._given("copy", lambda: target.copy_(source), None)

    def run(self, work: Callable[[], object], after: Mark) -> Mark:
        return self._given("compute", work, after)

    def wait(self, mark: Mark) -> None:
        self.events.append("wait")
        while not mark.reached:
            assert self._step(), "the host waits for ever"

    def _given(self, lane: str, work: Callable[[], object], after: Mark | None) -> Mark:
        self.events.append(lane)
        mark = Mark()
        self._lanes[lane].append((mark, after, work))
        for _ in range(self._random.choice((0, 0, 1, 3))):
            self._step()
        return mark

    def _step(self) -> bool:
        ready = [q for q in self._lanes.values() if q and (q[0][1] is None or q[0][1].reached)]
        if not ready:
            return False
        mark, _, work = self._random.choice(ready).popleft()
        work()
        mark.reached = True
        return True


class AtOnce(Lanes):
    """Every piece of work is done when it is given."""

    def _given(self, lane: str, work: Callable[[], object], after: Any) -> Mark:
        self.events.append(lane)
        work()
        return Mark(True)
