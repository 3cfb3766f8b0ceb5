"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from bench.measure import OURS, Ceiling, Group

WIDTH = 28
SHARES = {"visited_share": "visited", "pairs_evaluated": "pairs", "build_seconds": "build s"}


def lines(groups: dict[str, Group], ceiling: Ceiling, threads: int) -> Iterator[str]:
    """Give one table an operator, one row a size.

    Args:
        groups: "operator size" -> its timed group.
        ceiling: what the machine reached.
        threads: of every library.
    """
    yield (
        f"{threads} threads, ceiling {ceiling.flops / 1e9:.0f} Gop/s (int8 {ceiling.int8 / 1e9:.0f}) and "
        f"{ceiling.bytes / 1e9:.0f} GB/s. "
        "Median ms a call; ~ marks what other processes disturbed."
    )
    for (operator, _), names in groupby(
        groups, key=lambda name: (name.split()[0], list(groups[name].timings))
    ):
        rows = [(name.split()[1], groups[name]) for name in names]
        ours = [name for name in rows[0][1].timings if name.startswith(OURS)]
        contenders = [name for name in rows[0][1].timings if name not in ours[1:]]
        yield ""
        yield _row(operator, contenders, "ours / fastest peer, Gop/s, of ceiling" if ours else "")
        for size, group in rows:
            times = {name: f"{'~' * t.disturbed}{1e3 * t.median:.4g}" for name, t in group.timings.items()}
            memory = {
                name: f"{facts['peak_extra_bytes'] / 2**20:.1f}"
                for name, facts in group.facts.items()
                if facts.get("peak_extra_bytes") is not None
            }
            yield _row(
                size, [times[c] for c in contenders], _verdict(group, ours[0], ceiling) if ours else ""
            )
            if memory:
                yield _row("  peak extra MiB", [memory.get(c, "-") for c in contenders])
            blank = [""] * (len(contenders) - 1)
            for name in ours[1:]:
                yield _row(f"  {name}", [times[name], *blank], _verdict(group, name, ceiling))
                if memory:
                    yield _row("    peak extra MiB", [memory.get(name, "-")])
            for stage in group.timings[contenders[0]].stages:
                yield _row(f"  {stage}", [f"{1e3 * t.stages[stage]:.4g}" for t in group.timings.values()])


def _row(label: str, cells: Iterable[str], end: str = "") -> str:
    return f"{label:<{WIDTH}}" + "".join(f"{cell:>{max(12, len(cell) + 2)}}" for cell in cells) + f"   {end}"


def _verdict(group: Group, contender: str, ceiling: Ceiling) -> str:
    facts, timing = group.facts[contender], group.timings[contender]
    words = []
    if ratios := group.ratios(contender):
        fastest, ratio = next(iter(ratios.items()))
        mark = "~" * (timing.disturbed or group.timings[fastest].disturbed)
        words.append(f"{mark}{ratio:.2g} ({fastest})")
    if "flops" in facts:
        share = ceiling.share(facts["flops"], facts["bytes"], timing.median)
        words += [f"{facts['flops'] / timing.median / 1e9:.0f}", f"{share:.0%}"]
    words += [f"{label} {facts[key]:.2g}" for key, label in SHARES.items() if key in facts]
    return f"{', '.join(words)} [{facts.get('strategy', facts['backend'])}]"
