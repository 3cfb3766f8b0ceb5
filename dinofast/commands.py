"""What `dinofast demo | fit | predict | evaluate | info` do with their arguments, and how they print."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from dinofast.console import (
    AsJson,
    Axis,
    BackboneName,
    BatchSize,
    DetectorFile,
    Images,
    NonFinite,
    SkipBad,
    Window,
    blocks,
    create_model,
    parameter,
    print_json,
    print_table,
    reading_options,
    shown_progress,
    stdout_console,
)
from dinofast.errors import DinofastError, InputError
from dinofast.files import check_writable

app = typer.Typer(
    help="DINO patch features to anomaly maps: learn what is normal, map what is not.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FAILED, INTERRUPTED = 1, 130
"""Exit codes: something could not be used (the message says what); Ctrl-C. Usage errors exit with 2."""

_PANEL = "With --protocol"


class Level(str, Enum):
    """What a threshold is for."""

    pixel = "pixel"
    image = "image"


class Protocol(str, Enum):
    """Whose evaluation is followed."""

    bmad = "bmad"


@app.command()
def demo(
    data: Annotated[
        list[str] | None,
        typer.Option(help="brain (embedded) or lung-ct (fetches 70 MB once) [default: both]."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the report, maps and overlays.")] = Path(
        "demo-output"
    ),
    backbone: BackboneName = "auto",
    as_json: AsJson = False,
) -> None:
    """Run the main job on real scans: fit, calibrate, score, report."""
    from dinofast.data.demo import NAMES
    from dinofast.demo import run, tables

    with shown_progress(as_json) as progress:
        result = run(data or NAMES, output, backbone=backbone, progress=progress)
    if as_json:
        print_json(asdict(result))
        return
    console = stdout_console()
    console.print(f"backbone: {result.backbone}", markup=False)
    for found in result.sets:
        console.print(
            f"\n{found.name}: {found.citation} License: {found.license}.", markup=False, highlight=False
        )
        for table in tables(found):
            print_table(console, table.caption, list(table.head), [list(map(str, row)) for row in table.rows])
        console.print(f"maps {found.map_file}", markup=False, highlight=False)
    for name, reason in result.skipped.items():
        console.print(f"\n{name} was skipped: {reason}", markup=False)
    console.print(f"\npeak memory {result.peak_memory / 2**20:.0f} MiB", highlight=False)
    pixel = result.sets[0].evaluation.pixel
    assert pixel is not None
    print(f"pixel AUROC {pixel.auroc:.2f} · AUPR {pixel.aupr:.2f} · report {result.report}")


@app.command()
def fit(
    images: Images,
    out: Annotated[Path, typer.Option(help="Detector file to write (.safetensors).")],
    backbone: BackboneName = "auto",
    model: Annotated[str, typer.Option(help="Model by name.")] = "memory_bank",
    param: Annotated[
        list[str] | None, typer.Option(help="Model parameter NAME=VALUE, such as n_neighbors=3; repeatable.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of the smaller edge [default: the backbone's].")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Blocks to tap, such as 8,11 [default: the last].")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=1, help="Use only this many images, in sorted order.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which run of --shots; seed of calibration.")] = 0,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Also learn each image turned by 45° steps.")
    ] = False,
    calibrate: Annotated[
        list[str] | None, typer.Option(help="Other normal images, for the threshold; repeatable.")
    ] = None,
    cross_fit: Annotated[
        int | None, typer.Option(min=2, help="Calibrate on the images of the fit, in this many parts.")
    ] = None,
    fpr: Annotated[float, typer.Option(help="Wanted share of false alarms.")] = 0.05,
    level: Annotated[Level, typer.Option(help="What the threshold is for.")] = Level.pixel,
    axis: Axis = None,
    window: Window = None,
    nonfinite: NonFinite = "error",
    batch_size: BatchSize = None,
    skip_bad: SkipBad = False,
    as_json: AsJson = False,
) -> None:
    """Learn what is normal from normal images, and save a detector."""
    from dinofast import backbone as backbones
    from dinofast import data
    from dinofast.detector import Detector

    if calibrate and cross_fit:
        raise typer.BadParameter("give --calibrate or --cross-fit, not both")
    if not 0 < fpr < 1:
        raise typer.BadParameter(f"--fpr {fpr}: give a rate above 0 and below 1, such as 0.05")
    check_writable(out)
    tapped, params = blocks(layers), dict(parameter(p) for p in param or [])
    work: dict[str, Any] = {"batch_size": batch_size, "skip_bad": skip_bad}
    reading = reading_options(axis, window, nonfinite)
    listed = data.samples(images, **reading)
    listed = listed if shots is None else data.shots(listed, shots, seed)
    normal = data.samples(calibrate, **reading) if calibrate else listed if cross_fit else []
    detector = Detector(
        backbones.load(backbone, size=size, layers=tapped), create_model(model, params), seed=seed
    )
    with shown_progress(as_json) as progress:
        detector.fit(listed, rotate=rotate, progress=progress, **work)
        try:
            if normal:
                detector.calibrate(
                    normal, fpr=fpr, level=level.value, cross_fit=cross_fit, progress=progress, **work
                )
        finally:  # what was learned is not lost when the images of the calibration cannot be used
            detector.save(out)
            if normal and not detector.thresholds:
                print(f"{out} was saved without a threshold", file=sys.stderr)
    found = {
        "detector": str(out),
        "images": detector.n_images,
        "backbone": detector.backbone.describe(),
        "model": repr(detector.model),
        "thresholds": {name: threshold.to_dict() for name, threshold in detector.thresholds.items()},
    }
    if as_json:
        print_json(found)
        return
    print(f"{found['backbone']}\n{found['model']} learned {detector.n_images} images")
    for threshold in detector.thresholds.values():
        print(threshold)
    print(f"detector {out}")


@app.command()
def predict(
    detector: DetectorFile,
    images: Images,
    out: Annotated[Path, typer.Option(help="Folder for maps, overlays and scores.json.")],
    backbone: Annotated[
        str | None, typer.Option(help="Where the backbone is now [default: as in the fit].")
    ] = None,
    axis: Axis = None,
    window: Window = None,
    nonfinite: NonFinite = "error",
    batch_size: BatchSize = None,
    skip_bad: SkipBad = False,
    as_json: AsJson = False,
) -> None:
    """Score images and write an anomaly map for each; volumes keep their affine and shape."""
    from dinofast import data
    from dinofast.detector import Detector
    from dinofast.output import write_predictions

    found = Detector.load(detector, backbone=backbone)
    with shown_progress(as_json) as progress:
        listed = data.samples(images, **{**found.reading, **reading_options(axis, window, nonfinite)})
        rows = write_predictions(
            found, listed, out, batch_size=batch_size, skip_bad=skip_bad, progress=progress
        )
    if as_json:
        said = {"backbone": found.backbone.describe(), "seconds": found.seconds}
        print_json({"output": str(out), **said, "images": rows})
        return
    console = stdout_console()
    print(found.backbone.describe())
    columns = ["source", "score", *(["anomalous"] if "image" in found.thresholds else [])]
    cells = [[r["source"], f"{r['score']:.4f}", str(r["is_anomalous"])][: len(columns)] for r in rows]
    print_table(console, f"{len(rows)} images", columns, cells)
    if "pixel" not in found.thresholds:
        print("no overlays: the detector has no pixel threshold (dinofast fit --calibrate or --cross-fit)")
    print(f"maps {out}")


@app.command()
def evaluate(
    detector: Annotated[
        Path,
        typer.Argument(
            metavar="DETECTOR|DATASET",
            help="A detector saved by `dinofast fit`. With --protocol: the folder of the data set.",
        ),
    ],
    root: Annotated[
        Path,
        typer.Argument(
            metavar="ROOT|MODEL",
            help="Labeled tree: good/ and bad/, or MVTec's train, test, ground_truth. With --protocol: a "
            "model by name, or a saved detector.",
        ),
    ],
    split: Annotated[
        str | None, typer.Option(help="train or test [default: test where there is one].")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Where the backbone is now [default: as in the fit; of a name: auto].")
    ] = None,
    batch_size: BatchSize = None,
    skip_bad: SkipBad = False,
    as_json: AsJson = False,
    protocol: Annotated[
        Protocol | None, typer.Option(help="Fit a model on DATASET and evaluate it as publications do.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file for everything.", rich_help_panel=_PANEL)
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="File for the fitted detector.", rich_help_panel=_PANEL)
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File that a long fit goes on from.", rich_help_panel=_PANEL)
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(help="Model parameter NAME=VALUE; repeatable.", rich_help_panel=_PANEL),
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="As in fit.", rich_help_panel=_PANEL)] = None,
    layers: Annotated[str | None, typer.Option(help="As in fit.", rich_help_panel=_PANEL)] = None,
    shots: Annotated[int | None, typer.Option(min=1, help="As in fit.", rich_help_panel=_PANEL)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which run of --shots.", rich_help_panel=_PANEL)] = 0,
    name: Annotated[
        str | None,
        typer.Option(
            "--set", help="brain, liver or resc [default: by folder names].", rich_help_panel=_PANEL
        ),
    ] = None,
    masks: Annotated[
        str,
        typer.Option(help="Anomalous is any channel above 0, or only gray 255.", rich_help_panel=_PANEL),
    ] = "any",
    labels: Annotated[
        str, typer.Option(help="Image labels from folder or mask.", rich_help_panel=_PANEL)
    ] = "folder",
    map_size: Annotated[
        str,
        typer.Option(help="Where maps meet masks: native, 240 or 224.", rich_help_panel=_PANEL),
    ] = "native",
    thresholds: Annotated[
        str, typer.Option(help="Quantiles of normal pixel or patch scores.", rich_help_panel=_PANEL)
    ] = "pixel",
    regions: Annotated[
        bool, typer.Option(help="Per-region overlap; needs scipy.", rich_help_panel=_PANEL)
    ] = True,
    against: Annotated[
        Path | None,
        typer.Option(help="JSON of another run, for the paired test.", rich_help_panel=_PANEL),
    ] = None,
) -> None:
    """Score labeled images: AUROC, AUPR and average precision of images and pixels.

    With --protocol bmad: learn DATASET's train, take thresholds from its valid, score its test, and show the
    figures beside the published ones.
    """
    if protocol is not None:
        if split is not None:
            raise typer.BadParameter("--split: a protocol says which split is for what; leave it out")
        from dinofast.protocol_command import run as run_protocol

        run_protocol(
            detector, str(root), backbone=backbone, param=param, size=size, layers=layers, shots=shots,
            seed=seed, name=name, masks=masks, labels=labels, map_size=map_size, thresholds=thresholds,
            regions=regions, against=against, out=out, save=save, checkpoint=checkpoint,
            batch_size=batch_size, skip_bad=skip_bad, as_json=as_json,
        )  # fmt: skip
        return
    from dinofast import data
    from dinofast.detector import Detector
    from dinofast.evaluate import evaluate as run

    found = Detector.load(detector, backbone=backbone)
    chosen = split or ("test" if (root / "test").is_dir() else None)
    with shown_progress(as_json) as progress:
        listed = found.check(data.folder(root, chosen), skip_bad=skip_bad, progress=progress)
        result = run(found, listed, batch_size=batch_size, progress=progress)
    if as_json:
        print_json({"backbone": found.backbone.describe(), **result.to_dict()})
        return
    rankings = {"image": result.image, "pixel": result.pixel}
    rows = [
        [
            name,
            f"{r.auroc:.4f}",
            f"{r.aupr:.4f}",
            f"{r.average_precision:.4f}",
            f"{r.n_anomalous}/{r.n_normal}",
        ]
        for name, r in rankings.items()
        if r is not None
    ]
    if not rows:
        raise InputError(
            f"{root}: {result.n_images} images of one kind only; AUROC needs normal and anomalous ones"
        )
    print(found.backbone.describe())
    head = ["level", "AUROC", "AUPR", "average precision", "anomalous/normal"]
    print_table(stdout_console(), f"{result.n_images} images", head, rows)
    print(
        ", ".join(f"{stage} {1e3 * spent:.1f} ms" for stage, spent in result.seconds.items()) + " per image"
    )


@app.command()
def info(as_json: AsJson = False) -> None:
    """List versions, devices, instruction set, and which backend computes what, or why it cannot."""
    from dinofast.info import info as collect

    found = collect()
    if as_json:
        print_json(found)
        return
    console = stdout_console()
    plain = [
        [name, ", ".join(v) if isinstance(v, list) else str(v)]
        for name, v in found.items()
        if not isinstance(v, dict)
    ]
    print_table(console, "dinofast", ["", ""], plain)
    print_table(console, "backends", ["backend", "state"], [[k, v] for k, v in found["backends"].items()])
    print_table(
        console,
        "operators",
        ["operator", "kernels"],
        [[k, ", ".join(v)] for k, v in found["operators"].items()],
    )
    print_table(console, "packages", ["package", "version"], [[k, v] for k, v in found["packages"].items()])


def run() -> None:
    """Run the command line; errors that a person can mend are one message on stderr and exit code 1."""
    handler: logging.Handler = logging.StreamHandler()
    if sys.stderr.isatty():
        handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    try:
        app()
    except DinofastError as error:
        print(f"dinofast: {error}", file=sys.stderr)
        sys.exit(FAILED)
    except (KeyboardInterrupt, SystemExit) as stop:  # typer turns Ctrl-C into this exit code, without a word
        if isinstance(stop, SystemExit) and stop.code != INTERRUPTED:
            raise
        print("dinofast: stopped; finished files are whole, nothing half-written is left", file=sys.stderr)
        sys.exit(INTERRUPTED)
