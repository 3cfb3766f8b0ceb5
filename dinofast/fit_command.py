"""What `dinofast fit | import | text` do with their arguments, and how they print."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinofast.console import (
    AsJson,
    Axis,
    BackboneName,
    BatchSize,
    Images,
    Layers,
    NonFinite,
    Param,
    Resize,
    Resizing,
    Size,
    SkipBad,
    Window,
    blocks,
    check_needs,
    create_model,
    labeled,
    load_backbone,
    parameter,
    print_json,
    reading_options,
    shown_progress,
)
from dinofast.errors import InputError
from dinofast.files import check_writable

if TYPE_CHECKING:
    from dinofast.detector import Detector

Out = Annotated[Path, typer.Option(help="Detector file to write (.safetensors).")]


class Level(str, Enum):
    """What a threshold is for."""

    pixel = "pixel"
    image = "image"


class Published(str, Enum):
    """Models whose published checkpoints can be imported."""

    spatial_ar = "spatial_ar"
    zero_shot = "zero_shot"


def fit(
    images: Images,
    out: Out,
    backbone: BackboneName = "auto",
    model: Annotated[str, typer.Option(help="Model by name.")] = "memory_bank",
    param: Param = None,
    size: Size = None,
    layers: Layers = None,
    resize: Resize = Resizing.edge,
    shots: Annotated[
        int | None, typer.Option(min=1, help="Use only this many images, in sorted order.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which run of --shots; seed of calibration.")] = 0,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Also learn each image turned by 45° steps.")
    ] = False,
    validation: Annotated[
        list[str] | None,
        typer.Option(help="Other normal images, to choose the best epoch by; repeatable. Models of epochs."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File that a long fit goes on from. Models of epochs.")
    ] = None,
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
    """Learn what is normal from normal images, and save a detector.

    A model that learns from masks, such as zero_shot, takes folders as IMAGES and --validation, each with
    good/ and others, or MVTec's train and test, and with ground_truth.
    """
    from dinofast import data
    from dinofast.detector import Detector

    if calibrate and cross_fit:
        raise typer.BadParameter("give --calibrate or --cross-fit, not both")
    if not 0 < fpr < 1:
        raise typer.BadParameter(f"--fpr {fpr}: give a rate above 0 and below 1, such as 0.05")
    check_writable(out)
    blocks(layers)
    learner = create_model(model, dict(parameter(p) for p in param or []))
    if learner.learns_from_masks and (cross_fit or rotate):
        wrong = "--cross-fit scores the images of the fit" if cross_fit else "--rotate turns images alone"
        raise typer.BadParameter(f"{wrong}, and {model} learns from abnormal ones with masks; leave it out")
    work: dict[str, Any] = {"batch_size": batch_size, "skip_bad": skip_bad}
    reading = reading_options(axis, window, nonfinite)

    def listed(paths: list[str]) -> list[data.Sample]:
        return labeled(paths, model) if learner.learns_from_masks else data.samples(paths, **reading)

    learned = listed(images) if shots is None else data.shots(listed(images), shots, seed)
    held_back = listed(validation) if validation else None
    normal = data.samples(calibrate, **reading) if calibrate else learned if cross_fit else []
    detector = Detector(load_backbone(backbone, size, layers, resize), learner, seed=seed)
    check_needs(detector)
    with shown_progress(as_json) as progress:
        detector.fit(
            learned, rotate=rotate, validation=held_back, checkpoint=checkpoint, progress=progress, **work
        )
        try:
            if normal:
                detector.calibrate(
                    normal, fpr=fpr, level=level.value, cross_fit=cross_fit, progress=progress, **work
                )
        finally:  # what was learned is not lost when the images of the calibration cannot be used
            detector.save(out)
            if normal and not detector.thresholds:
                print(f"{out} was saved without a threshold", file=sys.stderr)
    _say(detector, out, f"learned {detector.n_images} images", as_json)


def import_published(
    model: Annotated[Published, typer.Argument(help="Model by name.")],
    checkpoint: Annotated[Path, typer.Argument(help="The published checkpoint; no code in it is run.")],
    out: Out,
    text: Annotated[
        Path | None,
        typer.Option(help="zero_shot: text vectors, from `dinofast text`, of the adapters' tower."),
    ] = None,
    backward: Annotated[
        Path | None, typer.Option(help="spatial_ar: checkpoint of the network of turned maps.")
    ] = None,
    backbone: BackboneName = "auto",
    param: Param = None,
    size: Size = None,
    layers: Layers = None,
    resize: Resize = Resizing.squash,
    as_json: AsJson = False,
) -> None:
    """Turn a published checkpoint of zero_shot or spatial_ar into a detector.

    The backbone, its layers and its size must be those of the training: for AD-DINOv3's adapters
    --backbone dinov3-vitl16 --layers 5,11,17,23 --size 512. A file tells shapes, but not --param class_name
    of zero_shot, nor dilations and loss of spatial_ar.
    """
    from dinofast.detector import Detector
    from dinofast.models.spatial_ar import SpatialAR
    from dinofast.models.zero_shot import ZeroShot

    check_writable(out)
    params = dict(parameter(p) for p in param or [])
    zero_shot = model is Published.zero_shot
    unused = {"--text": None if zero_shot else text, "--backward": backward if zero_shot else None}
    if given := [option for option, path in unused.items() if path is not None]:
        raise typer.BadParameter(f"{', '.join(given)}: not for {model.value}; leave it out")
    if zero_shot and text is None:
        raise typer.BadParameter(
            "zero_shot needs --text FILE: make it with `dinofast text TOWER CLASS --out FILE`"
        )
    known = {"class_name", "image_score", "compat"} if zero_shot else {*SpatialAR.param_names()}
    if unknown := sorted(params.keys() - known):
        raise InputError(
            f"{model.value} has no parameter {', '.join(unknown)} for an import; it has "
            f"{', '.join(sorted(known))}"
        )
    try:
        learner = (
            ZeroShot.from_published(checkpoint, str(text), **params)
            if zero_shot
            else SpatialAR.from_published(checkpoint, backward, **params)
        )
    except TypeError as error:
        raise typer.BadParameter(f"--param: a value of the wrong type ({error})") from error
    detector = Detector(load_backbone(backbone, size, layers, resize), learner)
    check_needs(detector)
    detector.save(out)
    _say(detector, out, f"from {checkpoint}", as_json)


def text(
    tower: Annotated[
        str,
        typer.Argument(help="CLIP model: a folder, or a hub id such as openai/clip-vit-large-patch14-336."),
    ],
    classes: Annotated[
        list[str], typer.Argument(metavar="CLASS...", help="Nouns for what images show, such as brain.")
    ],
    out: Annotated[Path, typer.Option(help="File to write, for --param text=FILE of zero_shot.")],
    as_json: AsJson = False,
) -> None:
    """Turn class names into text vectors, two of them each, for models that read texts."""
    from dinofast.backbone import text as towers

    check_writable(out)
    found = towers.load(tower).vectors(classes)
    found.save(out)
    if as_json:
        said = {"text": str(out), "classes": found.names, "dim": found.dim}
        print_json({**said, "source": found.source, "tower": found.tower})
        return
    print(f"{', '.join(found.names)}: D = {found.dim}, by {found.source}\ntext vectors {out}")


def _say(detector: Detector, out: Path, how: str, as_json: bool) -> None:
    """Print what a saved detector is."""
    thresholds = detector.thresholds
    if as_json:
        print_json(
            {
                "detector": str(out),
                "images": detector.n_images,
                "backbone": detector.backbone.describe(),
                "model": repr(detector.model),
                "thresholds": {name: threshold.to_dict() for name, threshold in thresholds.items()},
            }
        )
        return
    print(f"{detector.backbone.describe()}\n{detector.model!r} {how}")
    for threshold in thresholds.values():
        print(threshold)
    print(f"detector {out}")
