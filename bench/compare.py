"""Judge a run against a saved one by its ratios to the peers, which a slow or busy machine leaves alone.

`python -m bench.compare bench/results/cpu-2-cores.json NEW.json` prints a line for each of our contenders and
exits with 1 when one of them got slower, with 2 when nothing can be judged. Of several new runs all must name
the same contender: a repeated run is a second opinion.

Each contender counts with its fastest sample of a run, which noise can only raise. How much longer ours takes
than it did is divided by how much longer the peers of its group take, their median: what is left is our own
change. Its error joins, for both runs, how far the second-fastest sample of ours and of the peers lies above
the fastest, and how far the peers disagree. A contender got slower when its change exceeds the tolerance and
twice this error. Without a peer, or where other processes disturbed most samples of one, nothing is judged.
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

from bench import OURS

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
        spread = statistics.median(abs(grown[name][0] - drift) for name in peers)
        noise = math.hypot(spread, statistics.median(grown[name][1] for name in peers))
        for name in both:
            if name.startswith(OURS):
                log, error = grown[name]
                disturbed = any(run[group][n]["disturbed"] for run in (before, after) for n in (name, *peers))
                yield Change(f"{group} {name}", math.exp(log - drift), math.hypot(error, noise), disturbed)


def comparable(saved: Run, new: Run) -> str | None:
    """Give the reason why two runs are not of the same kind of machine and libraries; None when they are."""
    old, now = (_kind(run["machine_info"]) for run in (saved, new))
    for name in old.keys() & now.keys():
        if old[name] != now[name]:
            return f"{name} was {old[name]} in the saved run and is {now[name]}"
    return None


def _kind(info: dict[str, Any]) -> dict[str, Any]:
    """Give what must be the same; a library that one of the runs did not have is no peer there."""
    libraries = {name: version for name, version in info.get("versions", {}).items() if name != OURS}
    facts = {name: info.get(name) for name in ("instruction_set", "threads")}
    return {**facts, "cpu": (info.get("cpu") or {}).get("brand_raw"), **libraries}


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


def main(arguments: list[str] | None = None) -> int:
    """Print the comparison; give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("saved", type=Path)
    parser.add_argument("new", type=Path, nargs="+")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="change that passes for noise")
    parser.add_argument("--disturbed", action="store_true", help="judge what other processes disturbed, too")
    asked = parser.parse_args(arguments)
    slower: list[set[str]] = []
    judged = 0
    for path in asked.new:
        try:
            saved, new = (json.loads(p.read_text(encoding="utf-8")) for p in (asked.saved, path))
            found = sorted(changes(saved, new), key=lambda change: change.name)
            reason = comparable(saved, new) or (None if found else "they have no group with a peer in common")
        except (OSError, KeyError, TypeError, ValueError) as error:
            reason = f"one of them is no JSON of pytest bench/ ({error!r})"
        if reason:
            print(f"{asked.saved} and {path} cannot be compared: {reason}")
            return 2
        slower.append(set())
        for change in found:
            verdict = "ok"
            if change.disturbed and not asked.disturbed:
                verdict = "unsure"
            elif change.slower(asked.tolerance):
                verdict = "SLOWER"
                slower[-1].add(change.name)
            judged += verdict != "unsure"
            noise = f"± {math.expm1(change.error):.1%}{' disturbed' * change.disturbed}"
            print(f"{verdict:<7} {change.growth - 1:+7.1%} {noise:<18} {change.name}")
    if not judged:
        print("nothing can be judged: other processes disturbed every group")
        return 2
    named = sorted(set.intersection(*slower))
    print("; ".join(["got slower", *named]) if named else "none got slower")
    return int(bool(named))


if __name__ == "__main__":
    sys.exit(main())
