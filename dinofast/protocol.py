"""BMAD's protocol: learn train, take thresholds from normal images of valid, score test once, pixel by pixel.

Nothing grows with a split but its list of names and one row an image: maps are pooled into histograms.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinofast import metrics, published
from dinofast.calibrate import PixelCalibrator, Threshold
from dinofast.data import Sample, bmad
from dinofast.data.sample import Mask
from dinofast.errors import InputError
from dinofast.evaluate import PixelRanking, rank
from dinofast.imaging import RGB, digest
from dinofast.metrics import PooledDice, RegionOverlap
from dinofast.metrics.regions import require_scipy
from dinofast.models.iterative import IterativeModel
from dinofast.scoreboard import DiceAt, ImageRow, Report
from dinofast.stream import Embedder

if TYPE_CHECKING:
    from dinofast.data.bmad import BMAD
    from dinofast.detector import Detector
    from dinofast.progress import Progress

MAP_SIZES: dict[str, tuple[int, int] | None] = {"native": None, "240": (240, 240), "224": (224, 224)}
"""Size at which maps and masks meet. "native": the image's own, as the DPMM's evaluation. "240": masks by
their nearest pixel, as Spatial AR's. "224": masks bilinearly, anomalous from 0.1 on, as BMAD's own loaders;
these resize gray levels and not, as here, the mask that the rule gave, so multi-level borders can differ."""

THRESHOLD_SOURCES = ("pixel", "patch")
"""What the normal quantiles are of: pixels of the maps (the DPMM paper), or patch scores (its code)."""

_BINS = 2**22
_BUDGET = 2**24


def run(
    detector: Detector,
    found: BMAD,
    *,
    train: Sequence[Sample] | None = None,
    map_size: str = "native",
    threshold_from: str = "pixel",
    regions: bool = True,
    batch_size: int | None = None,
    skip_bad: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    on_fit: Callable[[], object] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Fit a detector, unless it is fitted, and evaluate it by the protocol.

    Every image and mask is read once before the work begins, so that a bad one stops the run before anything
    is lost, and hashed, so that overlap between splits is known. Thresholds are for each rate the smallest
    value that at most this share of normal validation scores exceeds; normal means label 0. A model trained
    over epochs chooses the best one by the same images.

    Args:
        detector: fitted or not.
        found: the set.
        train: normal images to learn instead of all of `found.train`.
        map_size: one of `MAP_SIZES`.
        threshold_from: one of `THRESHOLD_SOURCES`.
        regions: whether to compute per-region overlap, which needs scipy.
        batch_size: images at a time; None chooses from free memory.
        skip_bad: leave out images that cannot be used, with a warning each.
        checkpoint: file in which a model trained over epochs keeps its run, and goes on from.
        on_fit: called when the detector is fitted, for instance to save it before test is scored.
        progress: called as progress(stage, done, total).

    Returns:
        The report. Pixel figures are exact up to 17 million test pixels and carry their error beyond.

    Raises:
        BadFilesError: images or masks that cannot be used, all named.
        InputError: an unknown option, no normal image in valid, no test mask that marks a pixel, scipy is
            missing, or what the model says.
    """
    for value, known, what in (
        (map_size, MAP_SIZES, "map size"),
        (threshold_from, THRESHOLD_SOURCES, "thresholds from"),
    ):
        if value not in known:
            raise InputError(f"{what} {value!r}: one of {', '.join(known)}")
    if regions:
        require_scipy()
    census = _Census()
    read = partial(census.read, detector, skip_bad=skip_bad, progress=progress)
    learned = read(found.train if train is None else train)
    valid, test = read(found.valid), read(found.test)
    normal = [s for s in valid if s.label == 0]
    if not normal:
        raise InputError(f"{found.root}: valid has no image of label 0; the thresholds are taken from these")
    if not any(census.marked[s.source] for s in test):
        raise InputError(
            f"{found.root}: no mask of test marks a pixel by the mask rule {found.mask_rule!r}; choose "
            f"another of {', '.join(bmad.MASK_RULES)}"
        )
    shared = bmad.overlap(
        {"train": learned, "valid": valid, "test": test}, lambda sample: census.hashes[sample.source]
    )
    notes = [*_count_notes(found), *_overlap_notes(shared), *_mask_notes(found, census, test)]
    notes += _seen_notes(detector, census, {"valid": valid, "test": test})
    fit_seconds: dict[str, float] = {}
    if not detector.model.is_fitted:
        held_back = normal if isinstance(detector.model, IterativeModel) else None
        detector.fit(
            learned, validation=held_back, checkpoint=checkpoint, batch_size=batch_size, progress=progress
        )
        fit_seconds = {stage: spent / detector.n_images for stage, spent in detector.total_seconds.items()}
        if on_fit is not None:
            on_fit()
    scorer = _Scorer(detector, map_size, batch_size, progress)
    thresholds = scorer.thresholds(normal, threshold_from)
    figures = scorer.figures(found.root, test, thresholds, regions)
    rows: list[ImageRow] = figures["images"]
    both = len({row.label for row in rows}) == 2
    scores, labels = np.array([r.score for r in rows]), np.array([r.label for r in rows])
    return Report(
        set=found.name,
        root=str(found.root),
        backbone=detector.backbone.describe(),
        model=repr(detector.model),
        model_bytes=sum(t.numel() * t.element_size() for t in detector.model.state().values()),
        n_train=detector.n_images,
        counts=found.counts,
        settings={
            "mask_rule": found.mask_rule,
            "labels": found.labels,
            "map_size": map_size,
            "threshold_from": threshold_from,
        },
        notes=notes,
        overlap=shared,
        image=rank(scores, labels) if both else None,
        image_wise=_image_wise(rows),
        published=published.compared(
            found.name,
            detector.model.name,
            asdict(figures["pixel"]),
            {at.fpr: at.dice for at in figures["dice"]},
            map_size,
        ),
        seconds=scorer.embedder.per_image(),
        fit_seconds=fit_seconds,
        **figures,
    )


class _Census:
    """What one reading of all images tells: hashes of pixels, and which masks mark anything."""

    def __init__(self) -> None:
        self.hashes: dict[str, bytes] = {}
        self.marked: dict[str, bool] = {}

    def read(
        self, detector: Detector, images: Sequence[Sample], *, skip_bad: bool, progress: Progress | None
    ) -> list[Sample]:
        """Check images as a detector does; gives those that can be used."""
        good = detector.check([self._watched(s) for s in images], skip_bad=skip_bad, progress=progress)
        originals = {s.source: s for s in images}
        return [originals[s.source] for s in good]

    def _watched(self, sample: Sample) -> Sample:
        def pixels() -> RGB:
            image = sample.load()
            self.hashes[sample.source] = digest(image)
            return image

        def truth() -> Mask:
            mask = sample.mask()
            assert mask is not None
            self.marked[sample.source] = bool(mask.any())
            return mask

        return replace(sample, reader=pixels, mask_reader=None if sample.mask_reader is None else truth)


@dataclass(frozen=True)
class _Scored:
    """One image's score and map (H, W) at the size asked for."""

    sample: Sample
    score: float
    map: NDArray[np.float32]


class _Scorer:
    """Run images through backbone and model, and pool what comes out."""

    def __init__(
        self, detector: Detector, map_size: str, batch_size: int | None, progress: Progress | None
    ) -> None:
        self.model, self.seed, self.size = detector.model, detector.seed, MAP_SIZES[map_size]
        self.embedder = Embedder(detector.backbone, intensity=detector.model.wants_intensity)
        self._batch_size, self._progress = batch_size, progress

    def thresholds(self, normal: Sequence[Sample], source: str) -> list[Threshold]:
        """Give the upper quantiles of normal images at each published rate."""
        calibrator = PixelCalibrator(published.DICE_RATES[0], seed=self.seed)
        if source == "patch":
            for sample, grid in self._patches(normal, "valid"):
                calibrator.update(grid, sample.source)
        else:
            for found in self._scored(normal, "valid"):
                calibrator.update(found.map, found.sample.source)
        return [calibrator.threshold(fpr=fpr) for fpr in published.DICE_RATES]

    def figures(
        self, root: Path, test: Sequence[Sample], thresholds: Sequence[Threshold], regions: bool
    ) -> dict[str, Any]:
        """Score test and give the fields of `Report` that come from its maps."""
        self.embedder.restart()
        pixel, overlap = PixelRanking(_BUDGET, _BINS), RegionOverlap() if regions else None
        dice, rows = PooledDice([t.value for t in thresholds]), []
        for found in self._scored(test, "test"):
            truth = _resized(found.sample, self.size)
            pixel.update(found.map, truth)
            dice.update(found.map, truth)
            if overlap is not None:
                overlap.update(found.map, truth)
            rows.append(_row(found, truth, root))
        ranking = pixel.ranking()
        if ranking is None:
            raise InputError(f"{root}: the masks of test mark all pixels or none; pixels cannot be ranked")
        values = zip(thresholds, dice.dice(), dice.false_positive_rates(), strict=True)
        return {
            "pixel": ranking,
            "pro": None if overlap is None else overlap.area(),
            "dice": [DiceAt(t.fpr, t, value, rate) for t, value, rate in values],
            "images": rows,
        }

    def _scored(self, images: Sequence[Sample], stage: str) -> Iterator[_Scored]:
        waiting = iter(images)
        for batch in self.embedder.batches(images, stage, self._batch_size, self._progress):
            for _, features in batch.by_size():
                start = time.perf_counter()
                scores = self.model.score(replace(features, image_size=self.size or features.image_size))
                values, maps = scores.score.tolist(), scores.map.cpu().numpy()
                self.embedder.timed("model", start)
                for value, map in zip(values, maps, strict=True):
                    yield _Scored(next(waiting), value, map)

    def _patches(self, images: Sequence[Sample], stage: str) -> Iterator[tuple[Sample, NDArray[np.float32]]]:
        """Give every image with its patch scores (h, w)."""
        waiting = iter(images)
        for batch in self.embedder.batches(images, stage, self._batch_size, self._progress):
            for grid in self.model.patch_scores(batch.features).cpu().numpy():
                yield next(waiting), grid


def _row(found: _Scored, truth: Mask, root: Path) -> ImageRow:
    sample, both = found.sample, bool(truth.any()) and not truth.all()
    assert sample.path is not None
    assert sample.label is not None
    return ImageRow(
        source=sample.path.relative_to(root).as_posix(),
        label=sample.label,
        score=found.score,
        auroc=metrics.auroc(found.map, truth) if both else None,
        aupr=metrics.aupr(found.map, truth) if both else None,
    )


def _resized(sample: Sample, size: tuple[int, int] | None) -> Mask:
    """Give the truth at the size of the maps, by the rules of `MAP_SIZES`."""
    mask = sample.mask()
    assert mask is not None
    if size is None or mask.shape == size:
        return mask
    gray = Image.fromarray(mask.astype(np.uint8) * 255)
    if size == MAP_SIZES["224"]:
        return np.asarray(gray.resize(size[::-1], Image.Resampling.BILINEAR)) >= 0.1 * 255
    return np.asarray(gray.resize(size[::-1], Image.Resampling.NEAREST)) > 0


def _image_wise(rows: Sequence[ImageRow]) -> dict[str, float] | None:
    pairs = [(row.auroc, row.aupr) for row in rows if row.auroc is not None and row.aupr is not None]
    if not pairs:
        return None
    auroc, aupr = np.mean(pairs, axis=0)
    return {"auroc": float(auroc), "aupr": float(aupr), "n_images": len(pairs)}


def _count_notes(found: BMAD) -> Iterator[str]:
    tables = found.differences()
    if found.name is None:
        yield "the set is not known by its folders' names, so nothing published stands beside it"
    agreeing = [source for source, table in tables.items() if not table]
    if agreeing:
        yield f"the counts are those of {' and '.join(agreeing)}"
        return
    for source, table in tables.items():
        listed = ", ".join(f"{part} {here} for {there}" for part, (here, there) in table.items())
        yield f"the counts differ from {source}'s: {listed}"


def _overlap_notes(shared: dict[str, list[tuple[str, str]]]) -> Iterator[str]:
    for pair, sources in shared.items():
        first, second = sources[0]
        yield f"{pair} share {len(sources)} images, {first} and {second} among them"


def _mask_notes(found: BMAD, census: _Census, test: Sequence[Sample]) -> Iterator[str]:
    empty = sum(s.label == 1 and not census.marked[s.source] for s in test)
    marked = sum(s.label == 0 and census.marked[s.source] for s in test)
    if empty:
        yield f"{empty} test images of label 1 have an empty mask by the rule {found.mask_rule!r}"
    if marked:
        yield f"{marked} test images of label 0 have a mask that marks something"
    if found.lone_masks:
        yield f"{len(found.lone_masks)} masks have no image, {found.lone_masks[0]} among them"


def _seen_notes(detector: Detector, census: _Census, splits: dict[str, list[Sample]]) -> Iterator[str]:
    """Say what a detector that came fitted has learned of the images it is judged by."""
    for split, images in splits.items():
        if known := [s.source for s in images if census.hashes[s.source] in detector.seen]:
            yield f"the detector has learned {len(known)} images of {split}, {known[0]} among them"
