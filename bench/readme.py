"""README's tables of figures: `python -m bench.readme` rewrites them from saved runs, and nothing else does.

A table stands between `<!-- NAME -->` and `<!-- end NAME -->`; what no saved run holds is left out, the
head too where no row is left.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinofast.files import replacing

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results"

Facts = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """One row of the operators' table.

    Attributes:
        label: what README calls it.
        group: operator and size, as the run names them.
        contender: which of ours.
        share: what the last column tells: "float32", "int8", "visited", "pairs" or nothing.
    """

    label: str
    group: str
    contender: str = "dinofast"
    share: str = ""


WORKS = [
    Work("`cosine_max` 1024 × 150", "cosine_max image_1024x150", share="float32"),
    Work("`cosine_max` 12 288 × 150", "cosine_max batch_12288x150", share="float32"),
    Work("`cosine_max` 1024 × 100 000", "cosine_max bank_1024x100000", share="float32"),
    Work(
        "`knn_topk` k = 1, 1024 × 100 000, random rows, tensor",
        "knn_topk bank_1024x100000_random",
        share="float32",
    ),
    Work('the same, `Bank` "lowp"', "knn_topk bank_1024x100000_random", "dinofast-lowp", "int8"),
    Work(
        'the same around 400 centers, `Bank` "pruned"',
        "knn_topk bank_1024x100000_clustered",
        "dinofast-pruned",
        "visited",
    ),
    Work(
        '`Bank` "auto", 1024 × 49 664 features of the lung CT, D = 232',
        "knn_topk bank_real_lung-ct",
        "dinofast-auto",
        "visited",
    ),
    Work(
        '`Bank` "auto", 1024 × 4608 features of the brain, D = 232',
        "knn_topk bank_real_brain",
        "dinofast-auto",
        "visited",
    ),
    Work("`knn_topk` k = 1, 1024 × 1024, tensor", "knn_topk brats_shot_1024x1024", share="float32"),
    Work("`cosine_map` 32×32 → 448×448, 150 prototypes", "cosine_map image_32_to_448", share="float32"),
    Work("`upsample_blur` 32×32 → 448×448, sigma 4", "upsample_blur image_32_to_448"),
    Work("`kmeans_step` 8192 × 64, random rows", "kmeans_step batch_8192x64_random", share="float32"),
    Work("`kmeans_step` 8192 × 64, clustered rows", "kmeans_step batch_8192x64_clustered", share="float32"),
    Work("`dpm_stats` 12 288 × 500, diagonal, clustered", "dpm_stats batch_12288x500_diag", share="pairs"),
    Work("`dpm_stats` 12 288 × 500, full, clustered", "dpm_stats batch_12288x500_full", share="pairs"),
    Work("`dpm_stats` 1024 × 64, full, clustered", "dpm_stats part_1024x64_full", share="pairs"),
    Work("greedy k-center, 500 of 10 000 random rows", "k_center random_500_of_10000"),
    Work("the same, clustered rows", "k_center clustered_500_of_10000"),
    Work("greedy k-center, 2000 of 20 000 random rows", "k_center random_2000_of_20000"),
    Work("the same, clustered rows", "k_center clustered_2000_of_20000"),
    Work(
        "`SpatialAR.patch_scores` 28×28×384 (torch: masks multiplied into convolutions)",
        "SpatialAR.patch_scores image_28x28",
        share="float32",
    ),
]
SHARES = {
    "float32": ("share_of_ceiling", "{} of float32"),
    "int8": ("share_of_int8_ceiling", "{} of int8"),
    "visited": ("visited_share", "visits {} of the rows"),
    "pairs": ("pairs_evaluated", "{} of the pairs in full"),
}
OPERATOR_RUNS = ("cpu-2-cores.json", "slow-2-cores.json")
"""Runs of `pytest bench/`; a group that several hold is taken from the first."""

MEMORY_INTRODUCTION = (
    "Peak extra memory of the second call in a process of its own, what a `Bank` holds beside its rows",
    "included, from `bench/results/memory-2-cores.json`",
    '(`pytest bench/ --memory -k "100000 or 12288 or 448 or 500_of_10000"`):',
    "",
)
"""Lines above the table of memory, where there is one."""


def operators() -> Iterator[str]:
    """Give what the operators took, and how much longer their peers did in the same run."""
    if machine := _read(OPERATOR_RUNS[0]).get("machine_info"):
        ceiling = machine["ceiling"]
        yield (
            f"Ceilings: {ceiling['flops'] / 1e9:.0f} Gop/s float32, {ceiling['int8'] / 1e9:.0f} int8, "
            f"{ceiling['bytes'] / 1e9:.0f} GB/s."
        )
        yield ""
    yield from _table("Work | Time | Peers | Share", _operator_rows())


def _operator_rows() -> Iterator[str]:
    runs = _groups(*OPERATOR_RUNS)
    for work in WORKS:
        if work.group in runs:
            found = runs[work.group]
            mine = found[work.contender]
            ratios = sorted(mine["ratio_to_peers"].items(), key=lambda pair: -pair[1])
            peers = ", ".join(f"{_mark(found[name])}{name} {times(1 / ratio)}" for name, ratio in ratios)
            key, form = SHARES.get(work.share, ("", ""))
            share = form.format(percent(mine[key])) if mine.get(key) is not None else ""
            yield f"| {work.label} | {_mark(mine)}{milliseconds(mine['seconds'])} | {peers} | {share} |"


def memory() -> Iterator[str]:
    """Give the peak extra memory of the operators and their peers, of a run with `--memory`."""
    if rows := list(_table("Work | dinofast | Peers", _memory_rows())):
        yield from MEMORY_INTRODUCTION
        yield from rows


def _memory_rows() -> Iterator[str]:
    runs = _groups("memory-2-cores.json")
    for work in WORKS:
        found = runs.get(work.group, {})
        if (mine := found.get(work.contender, {}).get("peak_extra_bytes")) is None:
            continue
        peers = {
            name: facts["peak_extra_bytes"]
            for name, facts in found.items()
            if not name.startswith("dinofast") and facts.get("peak_extra_bytes") is not None
        }
        cells = ", ".join(f"{name} {mebibytes(peers[name])}" for name in sorted(peers, key=peers.__getitem__))
        yield f"| {work.label} | {mebibytes(mine)} | {cells} |"


def demo() -> Iterator[str]:
    """Give what `dinofast demo` reached and took."""
    head = "Scan | Learned | Scored | Pixel AUROC | AUPR | AUPR of chance | Time a slice"
    yield from _table(head, _demo_rows())


def _demo_rows() -> Iterator[str]:
    for found in _read("demo-2-cores.json").get("sets", []):
        evaluation = found["evaluation"]
        pixel, seconds = evaluation["pixel"], evaluation["seconds"]
        chance = pixel["n_anomalous"] / (pixel["n_anomalous"] + pixel["n_normal"])
        whole, *parts = (1e3 * s for s in (sum(seconds.values()), seconds["backbone"], seconds["model"]))
        yield (
            f"| {found['name']} | {found['n_fit']} | {evaluation['n_images']} | {pixel['auroc']:.3f} | "
            f"{pixel['aupr']:.3f} | {chance:.3f} | "
            f"{whole:.0f} ms ({parts[0]:.0f} backbone, {parts[1]:.1f} model) |"
        )


def models() -> Iterator[str]:
    """Give what the models reached and took on real images."""
    head = "Set | Model | AUROC | AUPR | Fit | Model's share of an image | Size | Peak memory"
    yield from _table(head, _model_rows())


def _model_rows() -> Iterator[str]:
    for run in _read("real-2-cores.json").get("runs", []):
        seconds = run["seconds_per_image"]
        yield (
            f"| {run['set']} ({run['level']}) | {run['row']} | {run['auroc']:.3f} | {run['aupr']:.3f} | "
            f"{run['fit_seconds']:.0f} s | "
            f"{1e3 * seconds['model']:.1f} of {1e3 * sum(seconds.values()):.0f} ms | "
            f"{mebibytes(run['model_bytes'])} | {run['peak_bytes'] / 2**20:.0f} MiB |"
        )


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "demo": demo,
    "models": models,
    "operators": operators,
    "memory": memory,
}


def filled(text: str) -> str:
    """Put every table between its marks.

    Raises:
        ValueError: a table has no marks in the text, or more than one pair.
    """
    for name, table in TABLES.items():
        body = "".join(f"{line}\n" for line in table())
        text, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)",
            lambda marks, body=body: f"{marks[1]}{body}{marks[2]}",
            text,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(f"README.md marks the table {name} {count} times, not once")
    return text


def times(ratio: float) -> str:
    """Write how many times as long."""
    return f"{ratio:.0f}×" if ratio >= 9.95 else f"{ratio:.1f}×" if ratio >= 1 else f"{ratio:.2f}×"


def percent(share: float) -> str:
    """Write a share with two digits."""
    return f"{100 * share:.{0 if share >= 0.0995 else 1}f}%"


def milliseconds(seconds: float) -> str:
    """Write seconds as milliseconds with three digits."""
    value = 1e3 * seconds
    digits = 0 if value >= 99.5 else 1 if value >= 9.95 else 2 if value >= 0.995 else 3
    return f"{value:.{digits}f} ms"


def mebibytes(count: float) -> str:
    """Write bytes as MiB."""
    return f"{count / 2**20:.1f} MiB"


def _table(head: str, rows: Iterator[str]) -> Iterator[str]:
    """Give a table's lines, or none where it has no rows."""
    for number, row in enumerate(rows):
        if number == 0:
            yield f"| {head} |"
            yield "|" + "---|" * len(head.split(" | "))
        yield row


def _mark(facts: Facts) -> str:
    return "~" * facts["disturbed"]


def _groups(*names: str) -> dict[str, dict[str, Facts]]:
    """Give "operator size" -> contender -> facts and the median's seconds."""
    groups: dict[str, dict[str, Facts]] = {}
    for name in names:
        found: dict[str, dict[str, Facts]] = {}
        for bench in _read(name).get("benchmarks", []):
            facts = bench["extra_info"] | {"seconds": bench["stats"]["median"]}
            found.setdefault(bench["group"], {})[facts["contender"]] = facts
        groups = found | groups
    return groups


def _read(name: str) -> Any:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    """Rewrite README.md."""
    text = filled(README.read_text())
    with replacing(README) as path:
        path.write_text(text)


if __name__ == "__main__":
    main()
