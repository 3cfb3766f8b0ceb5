"""What `dinofast evaluate --protocol bmad DATASET MODEL` does with its arguments, and how it prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dinofast.console import Asked, print_json, print_table, shown_progress, stdout_console
from dinofast.errors import InputError

if TYPE_CHECKING:
    from dinofast.metrics import PairedTest
    from dinofast.scoreboard import Report


def run(
    dataset: Path,
    asked: Asked,
    *,
    name: str | None,
    masks: str,
    labels: str,
    map_size: str,
    thresholds: str,
    regions: bool,
    against: Path | None,
    skip_bad: bool,
) -> None:
    """Run the protocol and print its tables, or JSON.

    Args:
        dataset: folder of the set.
        asked: the model, and where results go; its seed is also that of the paired test.
        name: of the set.
        masks: see `dinofast.data.bmad.MASK_RULES`.
        labels: see `dinofast.data.bmad.LABEL_RULES`.
        map_size: see `dinofast.protocol.MAP_SIZES`.
        thresholds: see `dinofast.protocol.THRESHOLD_SOURCES`.
        regions: whether to compute per-region overlap.
        against: JSON of another run, for the paired test.
        skip_bad: leave out files that cannot be used.

    Raises:
        BadParameter: options of a fit beside a saved detector.
        InputError: see `dinofast.protocol.run`.
    """
    from dinofast import data, protocol, scoreboard

    asked.check()
    other = None if against is None else scoreboard.read(against)
    found = data.bmad.load(dataset, name, mask_rule=masks, labels=labels)
    if other is not None:
        scoreboard.check_comparable(found.name, {"mask_rule": masks, "map_size": map_size}, other)
    detector = asked.detector()
    with shown_progress(asked.as_json) as progress:
        report = protocol.run(
            detector,
            found,
            train=asked.learned(found.train),
            map_size=map_size,
            threshold_from=thresholds,
            regions=regions,
            batch_size=asked.batch_size,
            skip_bad=skip_bad,
            checkpoint=asked.checkpoint,
            on_fit=asked.on_fit(detector),
            progress=progress,
        )
    tests, failure = None, None
    if other is not None:
        try:
            tests = scoreboard.against(scoreboard.to_dict(report), other, seed=asked.seed)
        except InputError as error:  # told at the end: hours of scoring are not lost for it
            failure = error
    if asked.out is not None:
        scoreboard.write(asked.out, report, tests)
    if asked.as_json:
        print_json(scoreboard.to_dict(report, tests))
    else:
        _print(report, tests)
        if asked.out is not None:
            print(f"report {asked.out}")
    if failure is not None:
        raise failure


def _print(report: Report, tests: Mapping[str, PairedTest] | None) -> None:
    from dinofast import published, scoreboard

    console = stdout_console()
    for table in scoreboard.tables(report, tests):
        print_table(console, table.caption, list(table.head), [list(map(str, row)) for row in table.rows])
    keys = {row["source"]["key"] for row in report.published}
    for source in published.SOURCES:
        if source.key in keys:
            print(f"source {source}")
    for note in report.notes:
        print(f"note: {note}")
