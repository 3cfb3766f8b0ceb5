"""Score every normal image by a model of the others, when there are no more normal images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dinofast.data import Sample
from dinofast.errors import InputError
from dinofast.imaging import digest
from dinofast.models.base import Model
from dinofast.stream import Batch, Embedder
from dinofast.types import Features

if TYPE_CHECKING:
    from dinofast.progress import Progress

_LOG = logging.getLogger("dinofast")


def check_seen(images: Sequence[Sample], seen: Container[bytes], *, wanted: bool) -> None:
    """Hold images for a calibration to what it needs: with cross-fit those of the fit, else others.

    An image of one color, such as a slice of air, is like many others and counts for neither.

    Args:
        images: usable ones; each is read.
        seen: digests of the images of the fit, see `dinofast.imaging.digest`.
        wanted: whether they must be among these.

    Raises:
        InputError: some are not as they must be; up to three are named.
    """
    wrong = []
    for sample in images:
        image = sample.load()
        blank = (image == image[0, 0]).all()
        if not blank and (digest(image) in seen) != wanted:
            wrong.append(sample.source)
    if not wrong:
        return
    shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    if wanted:
        raise InputError(
            f"cross_fit needs the images of fit, and these were not among them: {shown}; leave them out, "
            "or calibrate on images that fit did not see without cross_fit"
        )
    raise InputError(
        f"calibrating on images that fit has seen gives a threshold that is too low: {shown}; give other "
        "normal images, or the images of fit with cross_fit=5"
    )


def runs_of_neighbors(images: Sequence[Sample], folds: int) -> list[list[Sample]]:
    """Cut images into `folds` runs of neighbors, so that slices beside each other stay together.

    Raises:
        InputError: fewer than 2 images, or a number of folds that they cannot be cut into.
    """
    if len(images) < 2:
        raise InputError("cross_fit needs at least 2 images, and there is 1; give more normal images")
    if not 2 <= folds <= len(images):
        raise InputError(f"cross_fit={folds}: {len(images)} images can be cut into 2 to {len(images)} parts")
    return [[images[i] for i in part] for part in np.array_split(np.arange(len(images)), folds)]


def n_passes(model: Model, folds: int) -> int:
    """Tell how often `models_of_the_others` reads each image, once more for scoring it."""
    return 2 if model.merges else folds


def models_of_the_others(
    model: Model, runs: Sequence[list[Sample]], features: Callable[[list[Sample]], Iterable[Features]]
) -> Iterator[tuple[list[Sample], Model]]:
    """Give each run with a model like `model` that was fitted on all the other runs.

    Models that merge are fitted once a run and joined; others, and all where a run alone is too little for a
    model, are fitted anew for every run.

    Args:
        model: its class and parameters are used, not what it has learned.
        runs: from `runs_of_neighbors`.
        features: reads and embeds images as `model` was fitted on them.
    """
    kind, params = type(model), model.params()
    partial: list[Model] = []
    if model.merges:
        try:
            partial = [kind(**params).fit(features(run)) for run in runs]
        except InputError as error:
            _LOG.info("fitting anew for every run, one alone does not do: %s", error)
    for i, run in enumerate(runs):
        others = kind(**params)
        if partial:
            first, *rest = (part for j, part in enumerate(partial) if j != i)
            others.load_state(first.state())
            for part in rest:
                others.merge(part)
        else:
            others.fit(features([image for j, part in enumerate(runs) if j != i for image in part]))
        yield run, others


def scored_runs(
    embedder: Embedder,
    model: Model,
    images: Sequence[Sample],
    folds: int,
    rotate: bool,
    batch_size: int | None,
    progress: Progress | None,
) -> Iterator[tuple[Iterator[Batch], Model]]:
    """Give the batches of each run of neighbors with a model that was fitted on all the other runs.

    Args:
        embedder: reads and embeds images.
        model: see `models_of_the_others`.
        images: those of the fit.
        folds: number of runs.
        rotate: whether models learn turned copies too.
        batch_size: images at a time; None chooses from free memory.
        progress: told of all images that are read for fits and scores together.

    Raises:
        InputError: see `runs_of_neighbors`.
    """
    runs, before = runs_of_neighbors(images, folds), 0
    total = n_passes(model, folds) * len(images)

    def batches(run: list[Sample], rotate: bool) -> Iterator[Batch]:
        nonlocal before
        start, before = before, before + len(run)

        def told(stage: str, done: int, _: int | None) -> None:
            if progress is not None:
                progress(stage, start + done, max(total, start + len(run)))

        return embedder.batches(run, "calibrate", batch_size, told, rotate=rotate)

    def features(run: list[Sample]) -> Iterator[Features]:
        return (batch.features for batch in batches(run, rotate))

    for run, others in models_of_the_others(model, runs, features):
        yield batches(run, False), others
