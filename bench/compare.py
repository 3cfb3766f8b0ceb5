"""Judge a run against a saved one by its ratios to the peers, which a slow or busy machine leaves alone.

`python -m bench.compare bench/results/cpu-2-cores.json NEW.json` prints a line for each of our contenders and
exits with 1 when one of them got slower, with 2 when the two runs cannot be compared.

Each contender counts with its fastest sample of a run, which noise can only raise. How much longer ours takes
than it did is divided by how much longer the peers of its group take, their median: what is left is our own
change. Its error joins, for both runs, how far the second-fastest sample of ours and of the peers lies above
the fastest. A contender got slower when its change exceeds the tolerance and twice this error. Without a peer
nothing is judged.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import OURS

TOLERANCE = 0.10
"""Change that passes for noise between two runs: memory placement, clocks, library threads."""

Run = dict[str, Any]
"""The JSON of pytest-benchmark."""


@dataclass(frozen=True)
class Change:
    """How the time of one of our contenders changed beside its peers'.

    Attributes:
        name: group and contender.
        growth: our time, new over saved, over that of the peers: above 1 is slower.
        error: of its logarithm.
        disturbed: whether other processes disturbed one of the samples that count.
    """

    name: str
    growth: float
    error: float
    disturbed: bool

    def slower(self, tolerance: float) -> bool:
        """Tell whether it grew by more than the tolerance and the noise."""
        return math.log(self.growth) > max(math.log1p(tolerance), 2 * self.error)


def changes(saved: Run, new: Run) -> Iterator[Change]:
    """Compare what both runs have."""
    before, after = _groups(saved), _groups(new)
    for group in before.keys() & after.keys():
        both = [name for name in before[group] if name in after[group]]
        grown = {name: _growth(before[group][name], after[group][name]) for name in both}
        peers = [name for name in both if not name.startswith(OURS)]
        if not peers:
            continue
        drift = statistics.median(grown[name][0] for name in peers)
        noise = statistics.median(grown[name][1] for name in peers)
        for name in both:
            if name.startswith(OURS):
                log, error = grown[name]
                disturbed = any(run[group][n]["disturbed"] for run in (before, after) for n in (name, *peers))
                yield Change(f"{group} {name}", math.exp(log - drift), math.hypot(error, noise), disturbed)


def comparable(saved: Run, new: Run) -> str | None:
    """Give the reason why two runs are not of the same kind of machine and libraries; None when they are."""
    for name in ("instruction_set", "threads", "cpu"):
        old, now = (run["machine_info"].get(name) for run in (saved, new))
        if name == "cpu":
            old, now = ((cpu or {}).get("brand_raw") for cpu in (old, now))
        if old != now:
            return f"{name} was {old} in the saved run and is {now}"
    return None


def _groups(run: Run) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for entry in run["benchmarks"]:
        facts = entry["extra_info"]
        if "samples_ms" in facts:
            groups.setdefault(entry["group"], {})[facts["contender"]] = facts
    return groups


def _growth(before: dict[str, Any], after: dict[str, Any]) -> tuple[float, float]:
    """Give the logarithm of new over saved time, and its error."""
    (old, old_next), (now, now_next) = (sorted(facts["samples_ms"])[:2] for facts in (before, after))
    return math.log(now / old), math.hypot(math.log(old_next / old), math.log(now_next / now))


def main() -> int:
    """Print the comparison; give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("saved", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="change that passes for noise")
    asked = parser.parse_args()
    try:
        saved, new = (json.loads(path.read_text(encoding="utf-8")) for path in (asked.saved, asked.new))
        found = sorted(changes(saved, new), key=lambda change: change.name)
        reason = comparable(saved, new) or (None if found else "they have no group with a peer in common")
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = f"one of them is no JSON of pytest bench/ ({error!r})"
    if reason:
        print(f"{asked.saved} and {asked.new} cannot be compared: {reason}")
        return 2
    slower = [change for change in found if change.slower(asked.tolerance)]
    for change in found:
        verdict = "SLOWER" if change in slower else "ok"
        noise = f"± {math.expm1(change.error):.1%}{' disturbed' * change.disturbed}"
        print(f"{verdict:<7} {change.growth - 1:+7.1%} {noise:<18} {change.name}")
    print(f"{len(slower)} of {len(found)} got slower")
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
