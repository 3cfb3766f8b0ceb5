"""What the commands share: options, how their text becomes Python, and how results are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dinofast.errors import InputError
from dinofast.files import check_writable
from dinofast.progress import Progress, rich_progress

if TYPE_CHECKING:
    from dinofast.backbone import Backbone
    from dinofast.data import Sample
    from dinofast.detector import Detector
    from dinofast.evaluate import Evaluation
    from dinofast.models.base import Model

SAVED = ".safetensors"
"""How the name of a saved detector ends, where a model by name may stand too."""


class Resizing(str, Enum):
    """How images become pixels of the backbone."""

    edge = "edge"
    squash = "squash"


Images = Annotated[
    list[str], typer.Argument(help="Images: files, folders, globs, NIfTI volumes (.nii, .nii.gz).")
]
Axis = Annotated[
    str | None,
    typer.Option(help="Slicing of volumes: axial, coronal, sagittal [default: axial; later, as in the fit]."),
]
Window = Annotated[
    tuple[float, float] | None,
    typer.Option(
        help="Intensities LOW HIGH of volumes shown as black and white "
        "[default: 0.5 and 99.5 %; later, as in the fit]."
    ),
]
NonFinite = Annotated[str, typer.Option(help="NaN and infinite voxels: error, or zero.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out files that cannot be read, naming each.")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Images at a time [default: from free memory].")]
BackboneName = Annotated[
    str, typer.Option(help="auto, a short name (dinov2-small), a hub id, a folder, a .pth file, random:NAME.")
]
Param = Annotated[
    list[str] | None, typer.Option(help="Model parameter NAME=VALUE, such as n_neighbors=3; repeatable.")
]
Size = Annotated[
    int | None, typer.Option(min=1, help="Pixels of the smaller edge [default: the backbone's].")
]
Layers = Annotated[str | None, typer.Option(help="Blocks to tap, such as 8,11 [default: the last].")]
Resize = Annotated[Resizing, typer.Option(help="edge keeps the aspect of images, squash makes them square.")]
DetectorFile = Annotated[Path, typer.Argument(help="A detector saved by `dinofast fit`.")]


@contextmanager
def shown_progress(quiet: bool) -> Iterator[Progress | None]:
    """Draw progress on stderr, or give None where a machine reads."""
    if quiet:
        yield None
    else:
        with rich_progress() as progress:
            yield progress


def reading_options(axis: str | None, window: tuple[float, float] | None, nonfinite: str) -> dict[str, Any]:
    """Give what was asked for as arguments of `dinofast.data.samples`."""
    asked = {"axis": axis, "window": window, "nonfinite": nonfinite}
    return {name: value for name, value in asked.items() if value is not None}


def blocks(text: str | None) -> list[int] | None:
    """Read --layers: numbers of blocks, separated by commas."""
    try:
        return None if text is None else [int(block) for block in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--layers {text}: give numbers of blocks, such as 8,11") from error


def parameter(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE; the value is JSON where it can be, else text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"--param {text}: give NAME=VALUE, such as n_neighbors=3")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def create_model(name: str, params: dict[str, Any]) -> Model:
    """Make a model from --model and --param; a value of the wrong type is a usage error."""
    from dinofast import models

    try:
        return models.create(name, **params)
    except TypeError as error:
        raise typer.BadParameter(f"--param: a value of the wrong type ({error})") from error


def labeled(roots: Sequence[str], model: str) -> list[Sample]:
    """List labeled folders with their masks, for a model that learns from masks.

    Raises:
        InputError: see `dinofast.data.folder`; no ground_truth in a folder.
    """
    from dinofast import data

    found = []
    for root in roots:
        images = data.folder(root)
        if any(image.mask_reader is None for image in images):
            raise InputError(
                f"{root}: has no ground_truth, and {model} learns from masks; put the mask of each anomalous "
                "image at ground_truth/<class>/<name>_mask.png"
            )
        found += images
    return found


def load_backbone(name: str, size: int | None, layers: str | None, resize: Resizing) -> Backbone:
    """Load a backbone as --backbone, --size, --layers and --resize say."""
    from dinofast import backbone

    squash = resize is Resizing.squash
    return backbone.load(name, size=size, layers=blocks(layers), resize="squash" if squash else "edge")


@dataclass(frozen=True)
class Asked:
    """What a command asks of a protocol: a model to fit, or a saved detector, and where results go.

    Attributes:
        model: name of a model to fit, or a saved detector.
        backbone: None is "auto" for a name and the backbone of the fit for a detector.
        param: model parameters NAME=VALUE.
        size: of the backbone's input.
        layers: blocks to tap.
        shots: learn only this many images.
        seed: which run of `shots`; seed of the detector.
        out: JSON file to write.
        save: file for the fitted detector.
        checkpoint: file that a fit over epochs goes on from.
        batch_size: images at a time.
        as_json: print JSON instead of tables.
    """

    model: str
    backbone: str | None
    param: list[str] | None
    size: int | None
    layers: str | None
    shots: int | None
    seed: int
    out: Path | None
    save: Path | None
    checkpoint: Path | None
    batch_size: int | None
    as_json: bool

    def check(self) -> None:
        """Refuse options of a fit beside a saved detector, as a usage error, and unwritable files.

        Raises:
            BadParameter: such options.
            InputError: such files.
        """
        names = ("param", "size", "layers", "shots", "save", "checkpoint")
        unused = [f"--{name}" for name in names if getattr(self, name) is not None]
        if unused and self.model.endswith(SAVED):
            raise typer.BadParameter(
                f"{', '.join(unused)}: {self.model} is fitted already; give a model by name"
            )
        for path in filter(None, (self.out, self.save)):
            check_writable(path)

    def detector(self) -> Detector:
        """Load a saved detector, or make one of a model by name, ready for a fit."""
        from dinofast.detector import Detector

        if self.model.endswith(SAVED):
            return Detector.load(self.model, backbone=self.backbone)
        learner = create_model(self.model, dict(parameter(p) for p in self.param or []))
        features = load_backbone(self.backbone or "auto", self.size, self.layers, Resizing.edge)
        detector = Detector(features, learner, seed=self.seed)
        check_needs(detector)
        return detector

    def learned(self, images: list[Sample]) -> list[Sample]:
        """Take as many images for the fit as are asked for."""
        from dinofast import data

        return images if self.shots is None else data.shots(images, self.shots, self.seed)

    def on_fit(self, detector: Detector) -> Callable[[], None] | None:
        """Give what saves the detector once it is fitted, or None."""
        save = self.save
        return None if save is None else lambda: detector.save(save)


def check_needs(detector: Detector) -> None:
    """Say what a model lacks, and which option gives it, before any image is read.

    Raises:
        InputError: text vectors, class tokens or the threshold of a mask are missing.
    """
    model, backbone = detector.model, detector.backbone
    name, params = model.name, model.params()
    if not model.is_fitted and "text" in params and params["text"] is None:
        raise InputError(
            f"{name} learns with text vectors; make them with `dinofast text TOWER {params['class_name']} "
            "--out FILE`, and give --param text=FILE"
        )
    if model.wants_cls and not backbone.has_cls:
        without = "match_descriptor" in params
        remedy = ", or --param match_descriptor=mean_patch, which needs none" if without else ""
        raise InputError(
            f"{name} needs class tokens, and {backbone.id} has none; give a DINOv2 or DINOv3 with "
            f"--backbone, such as dinov2-small{remedy}"
        )
    if getattr(model, "masking", False) and getattr(model, "mask_threshold", 0.0) is None:
        raise InputError(
            f"{name} needs the threshold of its mask: give --param mask_threshold=VALUE, in the units of the "
            "backbone's tokens; one is published only for the last block of a DINOv2"
        )


def print_rankings(caption: str, found: Evaluation) -> None:
    """Print the table of an evaluation, and where its time went.

    Raises:
        InputError: the images were of one kind only.
    """
    rows = [
        [
            level,
            f"{r.auroc:.4f}",
            f"{r.aupr:.4f}",
            f"{r.average_precision:.4f}",
            f"{r.n_anomalous}/{r.n_normal}",
        ]
        for level, r in {"image": found.image, "pixel": found.pixel}.items()
        if r is not None
    ]
    if not rows:
        raise InputError(
            f"{caption}: {found.n_images} images of one kind only; AUROC needs normal and anomalous ones"
        )
    head = ["level", "AUROC", "AUPR", "average precision", "anomalous/normal"]
    print_table(stdout_console(), f"{found.n_images} images", head, rows)
    spent = (f"{stage} {1e3 * seconds:.1f} ms" for stage, seconds in found.seconds.items())
    print(", ".join(spent) + " per image")


def print_json(value: object) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(value, indent=1, default=str, ensure_ascii=False))


def stdout_console() -> Console:
    """Give a console on stdout that breaks no path where nobody watches."""
    return Console(width=None if sys.stdout.isatty() else 500)


def print_table(target: Console, caption: str, head: list[str], rows: list[list[str]]) -> None:
    """Print a table of text; no cell is cut."""
    table = Table(title=caption, title_justify="left", title_style="bold")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    target.print(table, highlight=False, markup=False)
