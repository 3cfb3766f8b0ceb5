"""What the commands share: options, how their text becomes Python, and how results are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dinofast.progress import Progress, rich_progress

if TYPE_CHECKING:
    from dinofast.models.base import Model

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
