"""The main job: normal images in, anomaly maps out, with thresholds that mean a false-alarm rate."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dinofast import artifact, data, models
from dinofast import backbone as backbones
from dinofast.backbone import Backbone, saved
from dinofast.calibrate import LEVELS, PixelCalibrator, Threshold, image_threshold, marked
from dinofast.capture import Captured, Recorder
from dinofast.cross_fit import check_seen, scored_runs
from dinofast.data import Sample
from dinofast.errors import ArtifactError, InputError
from dinofast.imaging import HASH_BYTES
from dinofast.models.base import Model
from dinofast.models.iterative import IterativeModel
from dinofast.stream import Batch, Embedder
from dinofast.types import Features, Prediction

if TYPE_CHECKING:
    from typing_extensions import Self

    from dinofast.progress import Progress

DINOV2_MASK_THRESHOLD = 10.0
"""Published threshold of the foreground mask, in units of DINOv2's final-norm tokens."""


class Detector:
    """A backbone and a model that learn what is normal and map what is not.

    Args:
        backbone: a loaded backbone, or what `dinofast.backbone.load` takes.
        model: a model, or a name that `dinofast.models.create` knows. A model that masks the background and
            has no `mask_threshold` gets the published 10.0 when the backbone is a DINOv2 that taps its last
            block alone.
        seed: of everything random in calibration (the bootstrap of a rate's interval).

    A model that is fitted already, by itself or from a published file, is moved to the backbone's device and
    predicts at once.

    Raises:
        InputError: the model was fitted on features of another D than the backbone gives.

    Attributes:
        thresholds: level ("pixel", "image") -> calibrated `Threshold`; assign to change one.
        n_images: number of images learned; 0 before `fit`.
        reading: axis, window and percentiles with which `fit` read volumes, as `dinofast.data.samples` takes
            them; paths of volumes given later are read likewise. Empty without volumes, or when they differ.

    >>> normal = [np.random.default_rng(i).integers(0, 99, (64, 64, 3), np.uint8) for i in range(2)]
    >>> detector = Detector(backbones.load("efficientnet-lite0", device="cpu", size=64)).fit(normal)
    >>> [prediction] = detector.predict(normal[0])
    >>> prediction.map.shape, prediction.source
    (torch.Size([64, 64]), 'array')
    """

    def __init__(
        self,
        backbone: Backbone | str | os.PathLike[str] = "auto",
        model: Model | str = "memory_bank",
        *,
        seed: int = 0,
    ) -> None:
        self.backbone = backbone if isinstance(backbone, Backbone) else backbones.load(backbone)
        self.model = model if isinstance(model, Model) else models.create(model)
        if self.model.is_fitted:
            if self.model.n_channels != self.backbone.dim:
                raise InputError(
                    f"this {self.model.name} was fitted on features of D = {self.model.n_channels}, and "
                    f"{self.backbone.id} with layers {list(self.backbone.layers)} gives D = "
                    f"{self.backbone.dim}; load the backbone and layers of its fit."
                )
            self.model.to(self.backbone.device)
        self.seed = seed
        self.thresholds: dict[str, Threshold] = {}
        self.n_images = 0
        self.reading: dict[str, Any] = {}
        self._rotate = False
        self._embedder = Embedder(self.backbone, intensity=self.model.wants_intensity)
        self._seen: frozenset[bytes] = frozenset()
        unset = getattr(self.model, "masking", False) and getattr(self.model, "mask_threshold", 0.0) is None
        if unset and self.backbone.kind.startswith("dinov2") and self.backbone.taps_last_block:
            self.model.mask_threshold = DINOV2_MASK_THRESHOLD  # type: ignore[attr-defined]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per image of the last run by stage: read, preprocess, backbone, model."""
        return self._embedder.per_image()

    @property
    def total_seconds(self) -> dict[str, float]:
        """Seconds of the last run by stage; of a fit, those of its validation images too."""
        return self._embedder.total()

    @property
    def seen(self) -> frozenset[bytes]:
        """Digests of the images learned, see `dinofast.imaging.digest`."""
        return self._seen

    def check(self, images: Any, *, skip_bad: bool = False, progress: Progress | None = None) -> list[Sample]:
        """Read every image and mask once, so that a bad one is known before any work is lost.

        Args:
            images: whatever `dinofast.data.samples` takes.
            skip_bad: leave out files that cannot be used, with a warning each.
            progress: called as progress(stage, done, total).

        Returns:
            The usable images, in order.

        Raises:
            BadFilesError: files that cannot be used, too small or too long ones among them, all named.
            InputError: no images.
        """

        def shown(done: int, total: int) -> None:
            if progress is not None:
                progress("check", done, total)

        listed = data.samples(images, **self.reading)
        return data.check(listed, skip_bad=skip_bad, accept=self._embedder.accept, progress=shown)

    def fit(
        self,
        images: Any,
        *,
        rotate: bool = False,
        validation: Any = None,
        checkpoint: str | os.PathLike[str] | None = None,
        batch_size: int | None = None,
        skip_bad: bool = False,
        progress: Progress | None = None,
    ) -> Self:
        """Learn from normal images; earlier learning and thresholds are replaced.

        A model that `learns_from_masks` takes normal and abnormal images, all of them samples with masks.
        Every file is read once before the work begins, so a bad one stops the run before anything is lost.

        Args:
            images: whatever `dinofast.data.samples` takes.
            rotate: also learn each image turned by 45°, 90°, ... 315°, as AnomalyDINO's "agnostic" setting.
            validation: normal images that were held back, by which a model trained over epochs chooses the
                best one; whatever `dinofast.data.samples` takes.
            checkpoint: file in which a model trained over epochs keeps its run, and goes on from.
            batch_size: images at a time; None chooses from free memory.
            skip_bad: leave out files that cannot be used, with a warning each.
            progress: called as progress(stage, done, total).

        Returns:
            The detector itself. When an error is raised, it is as it was.

        Raises:
            BadFilesError: files that cannot be used, all named.
            InputError: no images, no mask of an image where the model needs it, or what the model says.
        """
        asked = validation is not None or checkpoint is not None
        if asked and not isinstance(self.model, IterativeModel):
            raise InputError(
                f"validation and checkpoint are for models trained over epochs; {self.model.name} is not one."
            )
        truth = self.model.learns_from_masks
        if truth and rotate:
            raise InputError(f"rotate turns images without their masks, and {self.model.name} needs them.")
        if self.model.wants_cls and not self.backbone.has_cls:
            raise InputError(
                f"{self.model!r} needs class tokens, and {self.backbone.id} has none; take a DINOv2 or "
                "DINOv3 backbone, or parameters that do without, such as match_descriptor='mean_patch' of "
                "support_kmeans and image_score='max' of zero_shot."
            )
        good = self.check(data.samples(images), skip_bad=skip_bad, progress=progress)
        held_back = [] if validation is None else self.check(data.samples(validation), progress=progress)
        seen: set[bytes] = set()
        self._embedder.restart()
        start = time.perf_counter()

        def features(listed: Sequence[Sample], stage: str, **options: Any) -> Iterator[Features]:
            stream = self._embedder.batches(listed, stage, batch_size, progress, truth=truth, **options)
            return (batch.features for batch in stream)

        stream = features(good, "fit", rotate=rotate, seen=seen)
        if isinstance(self.model, IterativeModel):
            held = features(held_back, "validation") if held_back else None
            self.model.fit(stream, validation=held, checkpoint=checkpoint, progress=progress)
        else:
            self.model.fit(stream)
        self._embedder.rest("model", start)
        self._seen, self.thresholds = frozenset(seen), {}
        self.n_images, self.reading, self._rotate = len(good), data.reading(good), rotate
        return self

    def predict(
        self,
        images: Any,
        *,
        batch_size: int | None = None,
        skip_bad: bool = False,
        progress: Progress | None = None,
    ) -> Iterator[Prediction]:
        """Score images one after the other; memory does not grow with their number.

        Args:
            images: whatever `dinofast.data.samples` takes; listed at once, read as they are scored.
            batch_size: images at a time; None chooses from free memory.
            skip_bad: pass over images that cannot be used, with a warning each.
            progress: called as progress(stage, done, total).

        Yields:
            One `Prediction` an image, in order; `map` at the image's own size.

        Raises:
            InputError: not fitted, no images, or an image that cannot be used, named; those before it
                have been yielded.
        """
        self.model.state()
        listed = data.samples(images, **self.reading)
        self._embedder.restart()
        stream = self._embedder.batches(listed, "predict", batch_size, progress, skip_bad=skip_bad)
        return self._predict(stream, self.model)

    def capture(
        self,
        size: tuple[int, int] | Sequence[tuple[int, int]],
        batch: int = 1,
        *,
        recorder: Recorder | None = None,
    ) -> Captured:
        """Record the path from resized images to maps in CUDA graphs, one for each size, for fast replays.

        Args:
            size: (H, W) of the images as they are read, or several such; maps have it too.
            batch: images of one replay; the places of fewer stay unused.
            recorder: what records; None is CUDA graphs on the backbone's GPU.

        Returns:
            What predicts by replays, until the detector learns, loads or moves.

        Raises:
            InputError: not fitted, no GPU, or a path that waits for values, with what to choose instead.
        """
        return Captured(self, size, batch, recorder)

    def calibrate(
        self,
        images: Any,
        *,
        fpr: float = 0.05,
        level: str = "pixel",
        cross_fit: int | None = None,
        batch_size: int | None = None,
        skip_bad: bool = False,
        progress: Progress | None = None,
    ) -> Threshold:
        """Set the threshold of one level from normal images only.

        Args:
            images: normal images that `fit` did not see; with `cross_fit`, the very images of `fit`.
            fpr: share of normal pixels or images that may exceed the threshold, in (0, 1).
            level: "pixel" (predictions get `mask`) or "image" (predictions get `is_anomalous`).
            cross_fit: when there are no other normal images: cut those of `fit` into this many runs of
                neighbors, and score each run by a model of the others.
            batch_size: see `fit`.
            skip_bad: see `fit`.
            progress: see `fit`.

        Returns:
            The threshold, kept in `thresholds[level]`; it says the realized rate and its 95 % interval.

        Raises:
            BadFilesError: files that cannot be used, all named.
            InputError: not fitted, an unknown level, images that `fit` has seen (without `cross_fit`) or has
                not (with it), or too few for this rate.
        """
        self.model.state()
        if level not in LEVELS:
            raise InputError(f"unknown level {level!r}; one of {', '.join(LEVELS)}")
        if cross_fit is not None and self.model.learns_from_masks:
            raise InputError(
                f"cross_fit scores the images of fit, and {self.model.name} learns from abnormal ones too; "
                "calibrate on other normal images."
            )
        pixels, scores = PixelCalibrator(fpr, seed=self.seed), []
        good = self.check(images, skip_bad=skip_bad, progress=progress)
        check_seen(good, self._seen, wanted=cross_fit is not None)
        self._embedder.restart()
        if cross_fit is None:
            method = "held-out"
            found = self._predict(self._embedder.batches(good, "calibrate", batch_size, progress), self.model)
        else:
            method = f"cross-fit {cross_fit}"
            parts = scored_runs(
                self._embedder, self.model, good, cross_fit, self._rotate, batch_size, progress
            )
            found = chain.from_iterable(self._predict(batches, others) for batches, others in parts)
        for prediction in found:
            scores.append(prediction.score)
            if level == "pixel":
                pixels.update(prediction.map, prediction.source)
        if level == "pixel":
            threshold = pixels.threshold(method=method)
        else:
            threshold = image_threshold(scores, fpr, method=method)
        self.thresholds = {**self.thresholds, level: threshold}
        return threshold

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted detector to a safetensors file; the same detector gives the same bytes.

        The backbone's weights are not in it, but everything that identifies them is.

        Raises:
            InputError: not fitted, or the file cannot be written.
        """
        hashes = np.frombuffer(b"".join(sorted(self._seen)), np.uint8).reshape(-1, HASH_BYTES)
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state().items()}
        tensors["seen"] = torch.from_numpy(hashes.copy())
        config = {
            "backbone": self.backbone.config,
            "backbone_source": self.backbone.source,
            "fit": {"n_images": self.n_images, "reading": self.reading, "rotate": self._rotate},
            "model": self.model.config(),
            "seed": self.seed,
            "thresholds": {level: threshold.to_dict() for level, threshold in self.thresholds.items()},
            "torch_version": str(torch.__version__),
        }
        artifact.write(path, "detector", tensors, config)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        backbone: Backbone | str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
    ) -> Self:
        """Read what `save` wrote, and load its backbone again.

        Args:
            path: file to read.
            backbone: the backbone of the fit, or where its weights are now; None looks where they were.
            device: where to run; by default a GPU where there is one.

        Returns:
            A detector that predicts as the saved one did.

        Raises:
            InputError: no such file, or it cannot be opened.
            ArtifactError: torn, foreign or newer, or backbone or preprocessing are not those of the fit.
            BackboneError: the weights are not there; pass `backbone`.
        """
        tensors, config = artifact.read(path, kind="detector")
        try:
            wanted, source, fit = config["backbone"], config["backbone_source"], config["fit"]
            learned = {name[6:]: t for name, t in tensors.items() if name.startswith("model.")}
            model = models.restore(config["model"], learned)
            thresholds = {name: Threshold.from_dict(t) for name, t in config["thresholds"].items()}
            hashes, seed, n_images, rotate = tensors["seen"], config["seed"], fit["n_images"], fit["rotate"]
            reading = {n: tuple(v) if isinstance(v, list) else v for n, v in fit["reading"].items()}
            asked = saved.options(wanted)
        except (AttributeError, LookupError, TypeError, InputError, ArtifactError) as error:
            raise ArtifactError(
                f"{path}: does not hold together ({error}); save the detector again."
            ) from error
        if not isinstance(backbone, Backbone):
            backbone = backbones.load(source if backbone is None else backbone, device=device, **asked)
        saved.check_same(path, wanted, backbone.config)
        try:
            detector = cls(backbone, model, seed=seed)
        except InputError as error:
            raise ArtifactError(f"{path}: does not hold together ({error}); fit again.") from error
        detector.thresholds, detector.n_images, detector.reading = thresholds, n_images, reading
        detector._rotate, detector._seen = rotate, frozenset(row.tobytes() for row in hashes.numpy())
        return detector

    def __repr__(self) -> str:
        state = "fitted" if self.model.is_fitted else "not fitted"
        return f"Detector({self.backbone.id}, {self.model!r}, {state})"

    def _predict(self, batches: Iterable[Batch], model: Model) -> Iterator[Prediction]:
        for batch in batches:
            for rows, features in batch.by_size():
                start = time.perf_counter()
                scores = model.score(features)
                values, maps = scores.score.tolist(), scores.map.cpu()
                self._embedder.timed("model", start)
                for row, value, map in zip(rows, values, maps, strict=True):
                    yield marked(value, map, batch.sources[row], self.thresholds)
