"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from bench.measure import Ceiling, Group
from bench.peers import OURS

WIDTH = 24


def lines(groups: dict[str, Group], ceiling: Ceiling, threads: int) -> Iterator[str]:
    """Give one table an operator, one row a size.

    Args:
        groups: "operator size" -> its timed group.
        ceiling: what the machine reached.
        threads: of every library.
    """
    yield (
        f"{threads} threads, ceiling {ceiling.flops / 1e9:.0f} Gop/s and {ceiling.bytes / 1e9:.0f} GB/s. "
        "Median ms a call; ~ marks what other processes disturbed."
    )
    for operator, names in groupby(groups, key=lambda name: name.split()[0]):
        rows = [(name.split()[1], groups[name]) for name in names]
        contenders = list(rows[0][1].timings)
        ours = OURS in contenders and len(contenders) > 1
        yield ""
        yield _row(operator, contenders, "ours / fastest peer, Gop/s, of ceiling" if ours else "")
        for size, group in rows:
            times = [f"{'~' * t.disturbed}{1e3 * t.median:.4g}" for t in group.timings.values()]
            yield _row(size, times, _verdict(group, ceiling) if ours else "")
            memory = [group.facts[c].get("peak_extra_bytes") for c in contenders]
            if any(m is not None for m in memory):
                yield _row("  peak extra MiB", ["-" if m is None else f"{m / 2**20:.1f}" for m in memory])
            for stage in group.timings[contenders[0]].stages:
                yield _row(f"  {stage}", [f"{1e3 * t.stages[stage]:.4g}" for t in group.timings.values()])


def _row(label: str, cells: Iterable[str], end: str = "") -> str:
    return f"{label:<{WIDTH}}" + "".join(f"{cell:>{max(12, len(cell) + 2)}}" for cell in cells) + f"   {end}"


def _verdict(group: Group, ceiling: Ceiling) -> str:
    facts, seconds = group.facts[OURS], group.timings[OURS].median
    fastest, ratio = group.ratio(OURS)
    mark = "~" * (group.timings[OURS].disturbed or group.timings[fastest].disturbed)
    gops, share = facts["flops"] / seconds / 1e9, ceiling.share(facts["flops"], facts["bytes"], seconds)
    return f"{mark}{ratio:.2f} ({fastest}), {gops:.0f}, {share:.0%} [{facts['backend']}]"
