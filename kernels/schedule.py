"""Persistent launches: as many programs as run at once; each takes one work item after another.

An item is a tile of queries and a part of the bank. Items of one part stand side by side, so programs that
run at once stream the same rows of the bank, and all but the first find them in the L2 cache. Results do not
depend on how many programs or parts there are: a part keeps the least (distance, row), and so does the merge.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from dinofast.kernels.tile import Variant

INTERPRETED = 2
"""Multiprocessors where none can be counted: under the interpreter."""
MOST_ITEMS = 1024
"""Items up to which the bank is split further, to leave no multiprocessor idle; bounds what parts keep."""
ENOUGH = 1.05
"""A split may take this much longer than the best one when it makes fewer parts to merge."""


class Launch(NamedTuple):
    """One line of a table of launch parameters.

    Attributes:
        rows: queries of a tile.
        columns: bank rows of a tile.
        depth: channels of a tile.
        per_processor: programs that run at once on a multiprocessor; it must have room for them.
        options: launch options, such as num_warps.
        bench: the line of bench/results that chose these; empty while no GPU has compared them.
    """

    rows: int
    columns: int
    depth: int
    per_processor: int
    options: dict[str, Any]
    bench: str = ""

    def variant(
        self, name: str, kernel: Any, signature: dict[str, str], constants: dict[str, int]
    ) -> Variant:
        """Describe a launch with these parameters for compiling ahead of time."""
        constants = constants | {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth}
        return Variant(name, kernel, signature, constants, self.options, self.per_processor)


class Schedule(NamedTuple):
    """How a launch goes over queries and bank.

    Attributes:
        programs: to launch.
        blocks: tiles of queries.
        parts: of the bank.
        share: bank rows of a part, whole tiles; the last part may have fewer.
    """

    programs: int
    blocks: int
    parts: int
    share: int


def multiprocessors(device: torch.device) -> int:
    """Count the multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=1024)
def split(blocks: int, tiles: int, programs: int) -> tuple[int, int]:
    """Split a bank for tiles of queries: (parts, tiles of a part).

    The time of a split is that of the program with most to do: the items it takes, times the tiles of each.
    """
    most = max(1, min(tiles, MOST_ITEMS // blocks))
    times = [triton.cdiv(blocks * p, programs) * triton.cdiv(tiles, p) for p in range(1, most + 1)]
    share = triton.cdiv(tiles, next(p for p, time in enumerate(times, 1) if time <= ENOUGH * min(times)))
    return triton.cdiv(tiles, share), share


def schedule(device: torch.device, launch: Launch, n: int, m: int) -> Schedule:
    """Lay out a launch for n >= 1 queries and m >= 1 bank rows."""
    blocks = triton.cdiv(n, launch.rows)
    resident = multiprocessors(device) * launch.per_processor
    parts, share = split(blocks, triton.cdiv(m, launch.columns), resident)
    return Schedule(min(resident, blocks * parts), blocks, parts, share * launch.columns)
