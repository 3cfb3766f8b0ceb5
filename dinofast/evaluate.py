"""Score labeled images with a fitted detector and say how well normal and anomalous separate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinofast import metrics
from dinofast.data import Sample
from dinofast.data.sample import Mask
from dinofast.errors import InputError
from dinofast.metrics import StreamedRanking
from dinofast.types import Prediction

if TYPE_CHECKING:
    from dinofast.detector import Detector
    from dinofast.progress import Progress

_GATHERED = 2**22


@dataclass(frozen=True)
class Ranking:
    """How well scores rank abnormal above normal.

    Attributes:
        auroc: area under the ROC curve, in [0, 1].
        aupr: trapezoidal area under the precision-recall curve.
        average_precision: its step-wise sibling.
        n_normal: normal images or pixels.
        n_anomalous: anomalous ones; their share is the AUPR of chance.
        error: largest error of the three figures; 0 when they are exact.
    """

    auroc: float
    aupr: float
    average_precision: float
    n_normal: int
    n_anomalous: int
    error: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        n_images: images scored.
        image: ranking of image scores; None unless there are normal and anomalous images.
        pixel: ranking of all pixels pooled; None unless every image has a mask and some pixels of each kind.
        seconds: seconds per image by stage.
        scores: image scores, in order.
        labels: 1 anomalous, 0 normal, None unknown, in order.
        sources: names of the images, in order.
    """

    n_images: int
    image: Ranking | None
    pixel: Ranking | None
    seconds: dict[str, float]
    scores: list[float] = field(repr=False)
    labels: list[int | None] = field(repr=False)
    sources: list[str] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Give everything as JSON types."""
        return asdict(self)


class PixelRanking:
    """Pool pixels of many maps: exact up to a budget of pixels, histograms with a proven bound beyond.

    Beyond the budget, memory stays as it is: 16 bytes a bin twice, and 5 bytes for each of the 4 million
    pixels that are gathered before they are counted.

    Args:
        budget: pixels kept exactly, at 5 bytes each and about 30 at the end.
        bins: of the histograms, see `StreamedRanking`.
    """

    def __init__(self, budget: int = 2**26, bins: int = 2**20) -> None:
        self._budget, self._bins, self._waiting = budget, bins, 0
        self._scores: list[NDArray[np.float32]] = []
        self._labels: list[Mask] = []
        self._pooled: StreamedRanking | None = None
        self._counts = np.zeros(2, np.int64)

    def update(self, map: NDArray[np.float32], truth: Mask) -> None:
        """Add one map with its truth, of the same shape."""
        self._scores.append(np.asarray(map, np.float32).reshape(-1))
        self._labels.append(truth.reshape(-1))
        positive = int(np.count_nonzero(truth))
        self._counts += (truth.size - positive, positive)
        self._waiting += truth.size
        if self._pooled is None and self._counts.sum() > self._budget:
            self._pooled = StreamedRanking(self._bins)
        if self._pooled is not None and self._waiting > _GATHERED:
            self._count(self._pooled)

    def _count(self, pooled: StreamedRanking) -> None:
        """Count what waits, a part at a time: each costs one pass over all bins."""
        while self._scores:
            scores, labels, size = [], [], 0
            while self._scores and size < _GATHERED:
                scores.append(self._scores.pop())
                labels.append(self._labels.pop())
                size += scores[-1].size
            pooled.update(np.concatenate(scores), np.concatenate(labels))
        self._waiting = 0

    def ranking(self) -> Ranking | None:
        """Rank what was added; None unless both kinds of pixels are there."""
        if not self._counts.all():
            return None
        normal, anomalous = (int(count) for count in self._counts)
        if self._pooled is None:
            return rank(np.concatenate(self._scores), np.concatenate(self._labels))
        self._count(self._pooled)
        found = self._pooled.auroc(), self._pooled.aupr(), self._pooled.average_precision()
        error = max(max(f.high - f.value, f.value - f.low) for f in found)
        auroc, aupr, average_precision = (f.value for f in found)
        return Ranking(auroc, aupr, average_precision, normal, anomalous, error)


def rank(scores: NDArray[Any], labels: NDArray[Any]) -> Ranking:
    """Rank scores exactly; both labels must occur.

    Args:
        scores: any shape.
        labels: same shape; 1 or True is anomalous.
    """
    anomalous = int(np.count_nonzero(labels))
    return Ranking(
        metrics.auroc(scores, labels),
        metrics.aupr(scores, labels),
        metrics.average_precision(scores, labels),
        n_normal=int(labels.size) - anomalous,
        n_anomalous=anomalous,
        error=0.0,
    )


def evaluate(
    detector: Detector,
    images: Sequence[Sample],
    *,
    region: Callable[[Sample], Mask | None] = lambda _: None,
    on_prediction: Callable[[Sample, Prediction], object] = lambda _s, _p: None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Predict labeled images and rank image scores and pixels.

    Args:
        detector: fitted.
        images: samples with labels, masks or both, such as `dinofast.data.folder` gives.
        region: gives the pixels of an image that count, bool (H, W), or None for all.
        on_prediction: called with each image and its prediction, in order.
        batch_size: images at a time; None chooses from free memory.
        progress: called as progress(stage, done, total).

    Returns:
        The evaluation. Pixel metrics are exact up to 67 million pixels and carry their error beyond.

    Raises:
        InputError: no labels and no masks, images that cannot be read, or masks of other sizes.
    """
    if all(s.label is None and s.mask_reader is None for s in images):
        raise InputError("none of these images has a label or a mask; nothing can be evaluated")
    pixels, scores = PixelRanking(), []
    every_mask = all(s.mask_reader is not None for s in images)
    predictions = detector.predict(images, batch_size=batch_size, progress=progress)
    for sample, prediction in zip(images, predictions, strict=True):
        scores.append(prediction.score)
        if every_mask and (truth := sample.mask()) is not None:
            inside, map = region(sample), prediction.map.numpy()
            if truth.shape != map.shape:
                raise InputError(
                    f"{sample.source}: is {map.shape} pixels, its mask {truth.shape}; export it anew"
                )
            pixels.update(*((map, truth) if inside is None else (map[inside], truth[inside])))
        on_prediction(sample, prediction)
    labels = [s.label for s in images]
    both = {0, 1} <= set(labels) and None not in labels
    return Evaluation(
        n_images=len(images),
        image=rank(np.array(scores), np.array(labels, np.bool_)) if both else None,
        pixel=pixels.ranking(),
        seconds=detector.seconds,
        scores=scores,
        labels=labels,
        sources=[s.source for s in images],
    )
