"""A detector that replays: images to their buckets, results in order, and nothing after a new fit."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor
from torch.nn import Parameter

from dinofast import data
from dinofast.backbone import Backbone
from dinofast.calibrate import Threshold, marked
from dinofast.capture.bucket import Bucket, Results
from dinofast.capture.path import Path
from dinofast.capture.recorder import CudaRecorder, Recorder
from dinofast.data import Sample
from dinofast.errors import InputError
from dinofast.imaging import RGB, as_size
from dinofast.models.base import Model
from dinofast.types import Prediction

if TYPE_CHECKING:
    from dinofast.progress import Progress

OTHER_SIZES = ("error", "eager")
_LOG = logging.getLogger("dinofast.capture")


class Owner(Protocol):
    """What is asked of a detector."""

    backbone: Backbone
    model: Model
    reading: dict[str, Any]
    thresholds: dict[str, Threshold]

    def predict(self, images: Any, *, skip_bad: bool = False) -> Iterator[Prediction]:
        """Score images without a recording."""


class Captured:
    """The path of one fitted detector, recorded for some sizes; made by `Detector.capture`.

    It holds its own memory: buffers, recordings, and the model's tensors as they were. When the detector
    learns or loads anything else, or moves, it is of no use any more and says so; thresholds may change.
    Not for several threads at once.

    Args:
        owner: the detector.
        size: (H, W) of images as they are read, or several.
        batch: images of one replay.
        recorder: what records; None is a CUDA graph on the backbone's device.

    Raises:
        InputError: not fitted, no GPU, a size that the backbone cannot take, or a path that cannot be
            recorded.

    Attributes:
        sizes: (H, W) of the images that it takes.
        batch: images of one replay.
    """

    def __init__(
        self,
        owner: Owner,
        size: tuple[int, int] | Sequence[tuple[int, int]],
        batch: int = 1,
        recorder: Recorder | None = None,
    ) -> None:
        if not isinstance(batch, int) or batch < 1:
            raise InputError(f"batch must be a whole number, at least 1, got {batch!r}")
        several = isinstance(size, tuple | list) and len(size) > 0 and isinstance(size[0], tuple | list)
        self.sizes = tuple(dict.fromkeys(map(as_size, size if several else [size])))
        self.batch = batch
        self._owner, self._backbone, self._model = owner, owner.backbone, owner.model
        self._state, self._params = self._model.state(), self._model.params()
        self._preprocess = self._backbone.preprocess
        self._parameters = list(self._backbone.parameters())
        self._weights = _addresses(self._parameters)
        recorder = CudaRecorder(self._backbone.device) if recorder is None else recorder
        self._buckets = {}
        for own in self.sizes:
            pixels = self._backbone.preprocess.cropped_size(*own)
            path = Path(self._backbone, self._model, own)
            self._buckets[own] = Bucket(path, pixels, batch, recorder)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{h}x{w}" for h, w in self.sizes)
        return f"Captured({self._model!r}, {sizes}, batch={self.batch})"

    def check(self) -> None:
        """Raise InputError when the detector is not what was recorded."""
        self._check(self._backbone.parameters())

    def _check_kept(self) -> None:
        """Do the same without a walk through the backbone's modules, in a tenth of the time."""
        self._check(self._parameters)

    def _check(self, parameters: Iterable[Parameter]) -> None:
        owner, model = self._owner, self._model
        changed = None
        if owner.model is not model or owner.backbone is not self._backbone:
            changed = "got another model or backbone"
        elif not model.is_fitted or not _same(model.state(), self._state):
            changed = "learned or loaded something else"
        elif model.params() != self._params:
            changed = "got other parameters"
        elif self._backbone.preprocess != self._preprocess:
            changed = "got another preprocessing"
        elif _addresses(parameters) != self._weights:
            changed = "moved its backbone, or changed its precision"
        if changed is not None:
            raise InputError(
                f"the detector {changed} after it was captured, and the recording would give the old maps; "
                "call capture again."
            )

    def predict(
        self,
        images: Any,
        *,
        other_sizes: str = "error",
        skip_bad: bool = False,
        progress: Progress | None = None,
    ) -> Iterator[Prediction]:
        """Score images one after the other, as `Detector.predict`, by replays.

        Neighbors of one size share a replay; while it computes, the next images are read and copied.

        Args:
            images: whatever `dinofast.data.samples` takes.
            other_sizes: what to do with an image of a size that was not captured: "error", or "eager", score
                it as `Detector.predict` does.
            skip_bad: pass over images that cannot be used, with a warning each.
            progress: called as progress(stage, done, total).

        Yields:
            One `Prediction` an image, in order; `map` at the image's own size.

        Raises:
            InputError: an image that cannot be used or gives NaN, or one of another size; those before it
                have been yielded. Or the detector has changed since: then nothing more is yielded, not even
                what was computed before.
        """
        if other_sizes not in OTHER_SIZES:
            raise InputError(f"unknown other_sizes {other_sizes!r}; one of {', '.join(OTHER_SIZES)}")
        self.check()
        listed = data.samples(images, **self._owner.reading)
        return self._predict(listed, other_sizes, skip_bad, progress)

    def _predict(
        self, listed: Sequence[Sample], other_sizes: str, skip_bad: bool, progress: Progress | None
    ) -> Iterator[Prediction]:
        queue = _Queue(self)
        for done, sample in enumerate(listed):
            if progress is not None:
                progress("predict", done, len(listed))
            try:
                image = data.judged(sample)
            except InputError as error:
                if skip_bad:
                    _LOG.warning("skipped %s: %s", sample.source, error)
                    continue
                yield from queue.drained()
                raise
            size = image.shape[:2]
            bucket = self._buckets.get(size)
            if bucket is None:
                yield from queue.drained()
                if other_sizes == "error":
                    raise InputError(
                        f"{sample.source}: {size[0]}x{size[1]} pixels, and captured are "
                        f"{', '.join(f'{h}x{w}' for h, w in self.sizes)}; capture this size too, or pass "
                        "other_sizes='eager'."
                    )
                self.check()
                yield from self._owner.predict(_read(sample, image), skip_bad=skip_bad)
                continue
            if self._backbone.preprocess != self._preprocess:
                self.check()
            yield from queue.add(bucket, sample.source, self._backbone.preprocess.resized(image))
        yield from queue.drained()
        if progress is not None:
            progress("predict", len(listed), len(listed))


@dataclass(frozen=True)
class _Running:
    """A batch that computes, and the thresholds of when it was started."""

    sources: list[str]
    fetch: Callable[[], Results]
    thresholds: dict[str, Threshold]


class _Queue:
    """Images on their way: those that wait for a full batch, and at most two batches that compute."""

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        self._bucket: Bucket | None = None
        self._waiting: list[tuple[str, RGB]] = []
        self._running: deque[_Running] = deque()

    def add(self, bucket: Bucket, source: str, image: RGB) -> Iterator[Prediction]:
        """Take an image; give what is ready."""
        if self._bucket is not bucket:
            yield from self._start()
        self._bucket = bucket
        self._waiting.append((source, image))
        if len(self._waiting) == bucket.batch:
            yield from self._start()

    def drained(self) -> Iterator[Prediction]:
        """Start what waits, and give everything."""
        yield from self._start()
        while self._running:
            yield from self._finish()

    def _start(self) -> Iterator[Prediction]:
        if not self._waiting or self._bucket is None:
            return
        waiting, self._waiting = self._waiting, []
        fetch = self._bucket.submit([image for _, image in waiting])
        sources, thresholds = [source for source, _ in waiting], dict(self._captured._owner.thresholds)
        self._running.append(_Running(sources, fetch, thresholds))
        while len(self._running) > 1:
            yield from self._finish()

    def _finish(self) -> Iterator[Prediction]:
        running = self._running.popleft()
        found = running.fetch()
        self._captured.check()
        rows = zip(running.sources, found.score.tolist(), found.map, found.broken.tolist(), strict=True)
        for source, score, map, broken in rows:
            self._captured._check_kept()  # the caller may have had it learn between two results
            if broken:
                raise InputError(
                    f"{source}: {broken} of its tokens are NaN or infinite; run the backbone in float32 or "
                    "bfloat16 if it runs in float16."
                )
            yield marked(score, map, source, running.thresholds)


def _same(state: dict[str, Tensor], kept: dict[str, Tensor]) -> bool:
    """Tell whether both hold the very same tensors."""
    return state.keys() == kept.keys() and all(state[name] is kept[name] for name in kept)


def _addresses(parameters: Iterable[Parameter]) -> tuple[int, ...]:
    return tuple(weight.data_ptr() for weight in parameters)


def _read(sample: Sample, image: RGB) -> Sample:
    """Give the sample with its pixels, so that they are not read again."""
    return replace(sample, reader=lambda: image)
