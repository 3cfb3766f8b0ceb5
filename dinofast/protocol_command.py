"""What `dinofast evaluate --protocol bmad DATASET MODEL` does with its arguments, and how it prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dinofast.console import (
    chosen_detector,
    print_json,
    print_table,
    refuse_fit_options,
    shown_progress,
    stdout_console,
)
from dinofast.errors import InputError
from dinofast.files import check_writable

if TYPE_CHECKING:
    from dinofast.metrics import PairedTest
    from dinofast.scoreboard import Report


def run(
    dataset: Path,
    model: str,
    *,
    backbone: str | None,
    param: list[str] | None,
    size: int | None,
    layers: str | None,
    shots: int | None,
    seed: int,
    name: str | None,
    masks: str,
    labels: str,
    map_size: str,
    thresholds: str,
    regions: bool,
    against: Path | None,
    out: Path | None,
    save: Path | None,
    checkpoint: Path | None,
    batch_size: int | None,
    skip_bad: bool,
    as_json: bool,
) -> None:
    """Run the protocol and print its tables, or JSON.

    Args:
        dataset: folder of the set.
        model: name of a model to fit, or a saved detector.
        backbone: None is "auto" for a name and the backbone of the fit for a detector.
        param: model parameters NAME=VALUE.
        size: of the backbone's input.
        layers: blocks to tap.
        shots: learn only this many images.
        seed: which run of `shots`; seed of the detector and of the paired test.
        name: of the set.
        masks: see `dinofast.data.bmad.MASK_RULES`.
        labels: see `dinofast.data.bmad.LABEL_RULES`.
        map_size: see `dinofast.protocol.MAP_SIZES`.
        thresholds: see `dinofast.protocol.THRESHOLD_SOURCES`.
        regions: whether to compute per-region overlap.
        against: JSON of another run, for the paired test.
        out: JSON file to write.
        save: file for the fitted detector.
        checkpoint: file that a fit over epochs goes on from.
        batch_size: images at a time.
        skip_bad: leave out files that cannot be used.
        as_json: print JSON instead of tables.

    Raises:
        BadParameter: options of a fit beside a saved detector.
        InputError: see `dinofast.protocol.run`.
    """
    from dinofast import data, protocol, scoreboard

    given: dict[str, object] = {"--param": param, "--size": size, "--layers": layers, "--shots": shots}
    refuse_fit_options(model, given | {"--save": save, "--checkpoint": checkpoint})
    for path in filter(None, (out, save)):
        check_writable(path)
    other = None if against is None else scoreboard.read(against)
    found = data.bmad.load(dataset, name, mask_rule=masks, labels=labels)
    if other is not None:
        scoreboard.check_comparable(found.name, {"mask_rule": masks, "map_size": map_size}, other)
    detector = chosen_detector(model, backbone, param, size, layers, seed)
    with shown_progress(as_json) as progress:
        report = protocol.run(
            detector,
            found,
            train=None if shots is None else data.shots(found.train, shots, seed),
            map_size=map_size,
            threshold_from=thresholds,
            regions=regions,
            batch_size=batch_size,
            skip_bad=skip_bad,
            checkpoint=checkpoint,
            on_fit=None if save is None else lambda: detector.save(save),
            progress=progress,
        )
    tests, failure = None, None
    if other is not None:
        try:
            tests = scoreboard.against(scoreboard.to_dict(report), other, seed=seed)
        except InputError as error:  # told at the end: hours of scoring are not lost for it
            failure = error
    if out is not None:
        scoreboard.write(out, report, tests)
    if as_json:
        print_json(scoreboard.to_dict(report, tests))
    else:
        _print(report, tests)
        if out is not None:
            print(f"report {out}")
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
