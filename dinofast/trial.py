"""One model on one packaged set: fitted on normal images, tested on labeled ones, timed and weighed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dinofast.errors import InputError
from dinofast.evaluate import Evaluation, Ranking, evaluate
from dinofast.models.iterative import IterativeModel

if TYPE_CHECKING:
    from dinofast.data.split import SplitSet
    from dinofast.detector import Detector
    from dinofast.progress import Progress


@dataclass(frozen=True)
class Trial:
    """What `run` found.

    Attributes:
        set: name of the set.
        citation: whom to cite for it.
        license: of its images.
        note: what a reader of the figures must know.
        backbone: one line.
        model: its class and parameters.
        model_bytes: what was learned takes.
        n_fit: normal images learned.
        fit_seconds: wall time of the whole fit; None where the detector came fitted.
        fit_model_seconds: the model's share of it, reading and backbone left out.
        evaluation: of the test images.
    """

    set: str
    citation: str
    license: str
    note: str
    backbone: str
    model: str
    model_bytes: int
    n_fit: int
    fit_seconds: float | None
    fit_model_seconds: float | None
    evaluation: Evaluation

    @property
    def level(self) -> str:
        """Level of the headline: "pixel" where there are masks, else "image"."""
        return "pixel" if self.evaluation.pixel is not None else "image"

    @property
    def ranking(self) -> Ranking:
        """The headline, ranking at `level`."""
        found = self.evaluation.pixel or self.evaluation.image
        assert found is not None  # every packaged set has test images of both kinds
        return found

    def to_dict(self) -> dict[str, Any]:
        """Give everything as JSON types, `level` too."""
        return {**asdict(self), "level": self.level}


def run(
    detector: Detector,
    images: SplitSet,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    on_fit: Callable[[], object] | None = None,
    progress: Progress | None = None,
) -> Trial:
    """Fit a detector on a packaged set, unless it is fitted, and test it.

    A model trained over epochs chooses the best one by the set's calibration images, all normal.

    Args:
        detector: fitted or not.
        images: the set.
        checkpoint: file in which a model trained over epochs keeps its run, and goes on from.
        batch_size: images at a time; None chooses from free memory.
        on_fit: called when the detector is fitted, for instance to save it before the test.
        progress: called as progress(stage, done, total).

    Raises:
        BadFilesError: images that cannot be used, all named.
        InputError: an unfitted model that learns from masks, or what the model says.
    """
    fit_seconds = fit_model_seconds = None
    if not detector.model.is_fitted:
        if detector.model.learns_from_masks:
            raise InputError(
                f"{images.name} has normal images for the fit, and {detector.model.name} learns from "
                "abnormal ones with masks; give a fitted detector."
            )
        start = time.perf_counter()
        held_back = images.calibrate if isinstance(detector.model, IterativeModel) else None
        detector.fit(
            images.fit, validation=held_back, checkpoint=checkpoint, batch_size=batch_size, progress=progress
        )
        fit_seconds = time.perf_counter() - start
        fit_model_seconds = detector.total_seconds["model"]
        if on_fit is not None:
            on_fit()
    found = evaluate(detector, images.test, region=images.region, batch_size=batch_size, progress=progress)
    return Trial(
        set=images.name,
        citation=images.citation,
        license=images.license,
        note=images.note,
        backbone=detector.backbone.describe(),
        model=repr(detector.model),
        model_bytes=sum(tensor.nbytes for tensor in detector.model.state().values()),
        n_fit=detector.n_images,
        fit_seconds=fit_seconds,
        fit_model_seconds=fit_model_seconds,
        evaluation=found,
    )
