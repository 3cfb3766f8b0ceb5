"""The paper's table and figure from saved JSON alone: accuracy, runtime, memory, published and measured.

`python -m bench.table` reads dinofast/published.py and every JSON in bench/results/, prints Markdown and
writes it with the plot to bench/results/table.md and table.svg. Nothing is measured here; a cell without a
figure stays empty. Published rows name their GPU, measured ones their machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import OURS
from dinofast import published
from dinofast.errors import InputError
from dinofast.files import replacing

RESULTS = Path(__file__).parent / "results"
MARKERS = "osD^vP"
FLOOR = 75.0
"""Percent: what lies below is drawn on this line, with its figure."""
NO_TIMES = ("memory-", "short-")
"""Runs that were not saved for their times: taken while other work ran, or to be compared with."""
COLORS = {"dpmm": "tab:orange", "memory_bank": "tab:blue", "spatial_ar": "tab:green"}


@dataclass(frozen=True)
class Entry:
    """One method on one set.

    Attributes:
        set: name of the set.
        level: what is ranked: "pixel" or "image".
        method: as the source calls it.
        model: name in `dinofast.models`, None where there is none.
        auroc: percent.
        aupr: percent.
        runtime_ms: milliseconds an image.
        memory_gb: GPU memory of published rows, of measured ones the largest resident memory; 10^9 bytes.
        where: GPU or machine, and the source.
        measured: by us, in saved JSON.
    """

    set: str
    level: str
    method: str
    model: str | None
    auroc: float | None
    aupr: float | None
    runtime_ms: float | None
    memory_gb: float | None
    where: str
    measured: bool


def published_entries() -> Iterator[Entry]:
    """Give every published row."""
    for name in published.SETS:
        for row in published.rows(name):
            where = f"{row.source.gpu or 'GPU not stated'} [{row.source.key}]"
            figures = row.auroc, row.aupr, row.runtime_ms, row.memory_gb
            yield Entry(name, "pixel", row.method, row.model, *figures, where, False)


def measured_entries(name: str, content: Any) -> list[Entry]:
    """Give the rows of one saved JSON: of `bench.real`, or of `dinofast evaluate --protocol bmad`.

    Args:
        name: of the file.
        content: what it holds; anything else has no rows.
    """
    if not isinstance(content, dict):
        return []
    if content.get("protocol") == "bmad":
        pixel, model = content["pixel"], content["model"]
        method = f"dinofast {model.split('(')[0]}, {content['backbone'].split(':')[0]}"
        figures = 100 * pixel["auroc"], 100 * pixel["aupr"], _milliseconds(content["seconds"]), None
        where = f"machine not recorded [{name}]"
        return [Entry(content["set"] or "unknown", "pixel", method, _key(model), *figures, where, True)]
    if "runs" not in content or "about" not in content:
        return []
    about = content["about"]
    where = f"{about.get('cpu', about['machine'])}, {about['threads']} threads [{name}]"
    found = []
    for run in content["runs"]:
        weights = run["backbone"].removeprefix("random:")
        trained = weights == run["backbone"]
        auroc, aupr = (100 * run[key] if trained else None for key in ("auroc", "aupr"))
        method = f"{run['row']}, {weights}{'' if trained else ' size'}"
        figures = auroc, aupr, _milliseconds(run["seconds_per_image"]), run["peak_bytes"] / 1e9
        found.append(Entry(run["set"], run["level"], method, _key(run["row"]), *figures, where, True))
    return found


def _milliseconds(stages: dict[str, float]) -> float:
    """Add up the stages of an image, but for reading its file, as the papers do."""
    return 1e3 * sum(seconds for stage, seconds in stages.items() if stage != "read")


def _key(name: str) -> str | None:
    """Find the model that a row or a model's own line is named after."""
    plain = name.lower().replace("_", "")
    return next((key for key in COLORS if plain.startswith(key.replace("_", ""))), None)


def operator_rows(name: str, content: Any) -> list[str]:
    """Give Markdown rows of a saved run of pytest-benchmark, one for each of our contenders with a peer."""
    if not isinstance(content, dict) or "benchmarks" not in content:
        return []
    info = content["machine_info"]
    where = f"{info['cpu'].get('brand_raw', info['machine'])}, {info['threads']} threads [{name}]"
    rows = []
    for entry in content["benchmarks"]:
        facts = entry["extra_info"]
        if not facts.get("ratio_to_peers") or not facts["contender"].startswith(OURS):
            continue
        peers = ", ".join(f"{peer} {1 / ratio:.1f}×" for peer, ratio in facts["ratio_to_peers"].items())
        time = f"{'~' * facts.get('disturbed', False)}{1e3 * entry['stats']['median']:.3g} ms"
        extra = facts.get("peak_extra_bytes")
        memory = "" if extra is None else f"{extra / 2**20:.1f} MiB"
        cells = [entry["group"], facts["contender"], time, peers, memory, _share(facts), where]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _share(facts: dict[str, Any]) -> str:
    if "share_of_int8_ceiling" in facts:
        return f"{facts['share_of_int8_ceiling']:.0%} of int8"
    return f"{facts['share_of_ceiling']:.0%}" if "share_of_ceiling" in facts else ""


def markdown(entries: Iterable[Entry], operators: Iterable[str]) -> str:
    """Give both tables and the sources; the first is ordered by set, then AUROC."""
    lines = [
        "| Set | Method | | AUROC % | AUPR % | Runtime ms | Memory GB | Where |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for e in ordered(entries):
        kind = "measured" if e.measured else "published"
        cells = [_cell(e.auroc, ".2f"), _cell(e.aupr, ".2f"), _cell(e.runtime_ms, ".3g")]
        row = [f"{e.set} ({e.level})", e.method, kind, *cells, _cell(e.memory_gb, ".1f"), e.where]
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", *(f"- {source}" for source in published.SOURCES)]
    if rows := list(operators):
        head = "| Work | Contender | Time | Peers took | Extra memory | Of ceiling | Where |"
        lines += ["", head, "|---|---|---|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def ordered(entries: Iterable[Entry]) -> list[Entry]:
    """Sort by set, those of the papers first, then by AUROC, the best first."""
    names = {name: number for number, name in enumerate(published.SETS)}
    return sorted(entries, key=lambda e: (names.get(e.set, len(names)), e.set, -(e.auroc or 0)))


def _cell(value: float | None, kind: str) -> str:
    return "" if value is None else f"{value:{kind}}"


def plot(entries: Iterable[Entry], path: Path) -> None:
    """Draw runtime against AUROC, one panel a set: published rows hollow, measured ones filled.

    Args:
        entries: those without runtime or AUROC are left out.
        path: .svg, .png or .pdf.

    Raises:
        InputError: matplotlib is not installed, or nothing has both figures.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("the plot needs matplotlib: pip install 'dinofast[viz]'") from error
    from matplotlib.figure import Figure

    shown = [e for e in ordered(entries) if e.auroc is not None and e.runtime_ms is not None]
    if not shown:
        raise InputError("no row has both an AUROC and a runtime: there is nothing to plot")
    sets, places = list(dict.fromkeys(e.set for e in shown)), list(dict.fromkeys(e.where for e in shown))
    times = [e.runtime_ms or 0.0 for e in shown]
    columns = min(3, len(sets))
    figure = Figure(figsize=(6 * columns, 6 * -(-len(sets) // columns)), layout="constrained")
    grid = figure.subplots(-(-len(sets) // columns), columns, sharex=True, squeeze=False).ravel()
    for axes in grid[len(sets) :]:
        axes.set_visible(False)
    for number, (axes, name) in enumerate(zip(grid, sets, strict=False)):
        panel = [e for e in shown if e.set == name]
        for rank, e in enumerate(panel):
            color = COLORS.get(e.model or "", "gray")
            marker = MARKERS[places.index(e.where) % len(MARKERS)]
            fill = color if e.measured else "none"
            label, height = e.method, e.auroc
            if height < FLOOR:
                label, height = f"{label}: {height:.1f} ▾", FLOOR
            at = e.runtime_ms, height
            axes.plot(*at, marker, color=color, markerfacecolor=fill, markersize=7)
            shift = (5, 3 if rank % 2 else -8)
            axes.annotate(label, at, fontsize=6, xytext=shift, textcoords="offset points")
        axes.set(xscale="log", title=f"{name} ({panel[0].level})", xlabel="milliseconds an image")
        axes.set_xlim(min(times) / 1.5, max(times) * 4)
        axes.margins(y=0.2)
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.3)
        if number % columns == 0:
            axes.set_ylabel("AUROC, %")
        for place in dict.fromkeys(e.where for e in panel):
            mine = next(e for e in panel if e.where == place)
            marker, fill = MARKERS[places.index(place) % len(MARKERS)], "k" if mine.measured else "none"
            kind = "measured" if mine.measured else "published"
            axes.plot([], [], marker, color="k", markerfacecolor=fill, label=f"{kind}: {place}")
        axes.legend(fontsize=6, loc="lower right")
    kind = path.suffix.removeprefix(".") or "svg"
    metadata = {"Date": None} if kind == "svg" else None  # the same rows, the same file
    with matplotlib.rc_context({"svg.hashsalt": "dinofast"}), replacing(path) as temporary:
        figure.savefig(temporary, format=kind, metadata=metadata)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables; write them and the plot."""
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument(
        "files", nargs="*", type=Path, help="saved JSON; by default those of times in bench/results/"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "table.md", help="Markdown to write")
    parser.add_argument("--plot", type=Path, default=RESULTS / "table.svg", help="plot to write")
    asked = parser.parse_args(arguments)
    entries, operators, unread = list(published_entries()), [], []
    saved = [path for path in sorted(RESULTS.glob("*.json")) if not path.name.startswith(NO_TIMES)]
    for path in asked.files or saved:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows, measured = operator_rows(path.name, content), measured_entries(path.name, content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"{path} is no saved result: {error!r}")
        entries += measured
        operators += rows
        if not rows and not measured:
            unread.append(path.name)
    text = markdown(entries, operators)
    print(text)
    with replacing(asked.out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    if unread:
        print(f"without rows for these tables: {', '.join(unread)}")
    try:
        plot(entries, asked.plot)
        print(f"wrote {asked.out} and {asked.plot}")
    except InputError as error:
        print(f"wrote {asked.out}; no plot: {error}")


if __name__ == "__main__":
    main()
