"""What `dinofast evaluate --protocol packaged SET MODEL` does with its arguments, and how it prints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dinofast.console import chosen_detector, print_json, print_rankings, refuse_fit_options, shown_progress
from dinofast.errors import InputError
from dinofast.files import check_writable, replacing

if TYPE_CHECKING:
    from dinofast.trial import Trial


def run(
    name: str,
    model: str,
    *,
    backbone: str | None,
    param: list[str] | None,
    size: int | None,
    layers: str | None,
    shots: int | None,
    seed: int,
    out: Path | None,
    save: Path | None,
    checkpoint: Path | None,
    batch_size: int | None,
    as_json: bool,
) -> None:
    """Run one model on one packaged set and print a table, or JSON.

    Args:
        name: one of `dinofast.data.packaged.NAMES`.
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
        as_json: print JSON instead of a table.

    Raises:
        BadParameter: options of a fit beside a saved detector.
        InputError: see `dinofast.data.packaged.load` and `dinofast.trial.run`.
    """
    from dinofast import data, trial
    from dinofast.data import packaged

    given: dict[str, object] = {"--param": param, "--size": size, "--layers": layers, "--shots": shots}
    refuse_fit_options(model, given | {"--save": save, "--checkpoint": checkpoint})
    for path in filter(None, (out, save)):
        check_writable(path)
    if name not in packaged.NAMES:
        raise InputError(f"packaged set {name!r}: one of {', '.join(packaged.NAMES)}")
    detector = chosen_detector(model, backbone, param, size, layers, seed)
    with shown_progress(as_json) as progress:

        def fetched(done: int, total: int) -> None:
            if progress is not None:
                progress(f"{name}: fetch, MB", done // 10**6, total // 10**6)

        images = packaged.load(name, fetched)
        if shots is not None:
            images = replace(images, fit=data.shots(images.fit, shots, seed))
        found = trial.run(
            detector,
            images,
            checkpoint=checkpoint,
            batch_size=batch_size,
            on_fit=None if save is None else lambda: detector.save(save),
            progress=progress,
        )
    if out is not None:
        with replacing(out) as path:
            path.write_text(
                json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found)
        if out is not None:
            print(f"report {out}")


def _print(found: Trial) -> None:
    fitted = "came fitted"
    if found.fit_seconds is not None:
        fitted = f"learned {found.n_fit} images in {found.fit_seconds:.1f} s"
    print(f"{found.backbone}\n{found.model} {fitted}, {found.model_bytes / 2**20:.2f} MiB")
    print_rankings(found.set, found.evaluation)
    print(f"source {found.citation} License: {found.license}\nnote: {found.note}")
