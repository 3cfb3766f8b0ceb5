"""Images to features, batch by batch: read, preprocessed, embedded, hashed and timed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dinofast import data
from dinofast.backbone import Backbone
from dinofast.backbone.preprocess import patch_gray
from dinofast.data import Sample
from dinofast.errors import InputError
from dinofast.imaging import RGB, digest, rotations
from dinofast.types import Features

if TYPE_CHECKING:
    from dinofast.progress import Progress

STAGES = ("read", "preprocess", "backbone", "model")
_LOG = logging.getLogger("dinofast.detector")


@dataclass(frozen=True)
class Batch:
    """Features of images that share a preprocessed size, with the images' names and own sizes (H, W)."""

    sources: list[str]
    sizes: list[tuple[int, int]]
    features: Features

    def by_size(self) -> Iterator[tuple[range, Features]]:
        """Give runs of images that want maps of one size, in order."""
        start = 0
        for stop in range(1, len(self.sizes) + 1):
            if stop == len(self.sizes) or self.sizes[stop] != self.sizes[start]:
                part = self.features.part(start, stop)
                yield range(start, stop), replace(part, image_size=self.sizes[start])
                start = stop


@dataclass(frozen=True)
class _Waiting:
    """A preprocessed image that waits for its batch."""

    source: str
    size: tuple[int, int]
    pixels: Tensor
    mask: Tensor | None


class Embedder:
    """Run images through a backbone in batches, keeping the time that each stage takes.

    Args:
        backbone: from pixels to features.
        intensity: whether features get the mean gray of each patch as well.
    """

    def __init__(self, backbone: Backbone, *, intensity: bool = False) -> None:
        self.backbone, self.intensity = backbone, intensity
        self.restart()

    def restart(self) -> None:
        """Set the clocks to zero."""
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._n_images = 0

    def total(self) -> dict[str, float]:
        """Give the seconds of each stage since `restart`."""
        return dict(self._seconds)

    def per_image(self) -> dict[str, float]:
        """Give the seconds per image of each stage since `restart`."""
        return {stage: spent / max(1, self._n_images) for stage, spent in self._seconds.items()}

    def timed(self, stage: str, start: float) -> None:
        """Add the time since `start`, a `time.perf_counter`, to a stage, when the device is done with it."""
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize(self.backbone.device)
        self._seconds[stage] += time.perf_counter() - start

    def rest(self, stage: str, start: float) -> None:
        """Add the time since `start` that no other stage took."""
        self.timed(stage, start)
        self._seconds[stage] -= sum(spent for name, spent in self._seconds.items() if name != stage)

    def accept(self, image: RGB) -> None:
        """Raise InputError for an image that the backbone cannot take: too small, or too long and thin."""
        self.backbone.preprocess.cropped_size(*image.shape[:2])

    def batches(
        self,
        images: Sequence[Sample],
        stage: str,
        batch_size: int | None = None,
        progress: Progress | None = None,
        *,
        skip_bad: bool = False,
        rotate: bool = False,
        seen: set[bytes] | None = None,
        truth: bool = False,
    ) -> Iterator[Batch]:
        """Read and embed images in order, in batches of one preprocessed size.

        Args:
            images: what to read.
            stage: what `progress` is told.
            batch_size: images at a time; None chooses from free memory.
            progress: called as progress(stage, done, total).
            skip_bad: pass over images that cannot be used, with a warning each, instead of raising.
            rotate: embed eight turned copies of each image.
            seen: gets the digest of each image.
            truth: also read the masks, brought to the preprocessed size; not together with `rotate`.

        Yields:
            Batches, with `Features.masks` where `truth`.

        Raises:
            InputError: an image that cannot be used, named; those before it have been yielded.
        """
        waiting: list[_Waiting] = []
        limits: dict[torch.Size, int] = {}
        for done, sample in enumerate(images):
            if progress is not None:
                progress(stage, done, len(images))
            start = time.perf_counter()
            try:
                image = data.judged(sample, self.accept)
                mask = self._mask(sample, image) if truth else None
            except InputError as error:
                if skip_bad:
                    _LOG.warning("skipped %s: %s", sample.source, error)
                    continue
                if waiting:
                    yield self._embed(waiting)
                raise
            if seen is not None:
                seen.add(digest(image))
            self.timed("read", start)
            self._n_images += 1
            for turned in rotations(image) if rotate else (image,):
                start = time.perf_counter()
                pixels = self.backbone.preprocess(turned, sample.source)
                self.timed("preprocess", start)
                if pixels.shape not in limits:  # asked once: a caching allocator's free memory shrinks
                    limits[pixels.shape] = batch_size or self._batch_size(pixels, image)
                full = len(waiting) >= limits[pixels.shape]
                if waiting and (full or waiting[0].pixels.shape != pixels.shape):
                    yield self._embed(waiting)
                    waiting = []
                waiting.append(_Waiting(sample.source, (image.shape[0], image.shape[1]), pixels, mask))
        if waiting:
            yield self._embed(waiting)
        if progress is not None:
            progress(stage, len(images), len(images))

    def _mask(self, sample: Sample, image: RGB) -> Tensor:
        mask = sample.mask()
        if mask is None:
            raise InputError(
                f"{sample.source}: has no mask, and this model learns from masks; give samples that have "
                "one, all False for normal images, as dinofast.data.folder does of a tree with ground_truth"
            )
        if mask.shape != image.shape[:2]:
            raise InputError(
                f"{sample.source}: its mask has the size (H, W) = {mask.shape}, the image {image.shape[:2]}; "
                "export it anew"
            )
        return torch.from_numpy(self.backbone.preprocess.mask(mask))

    def _embed(self, waiting: list[_Waiting]) -> Batch:
        start = time.perf_counter()
        pixels = torch.stack([one.pixels for one in waiting])
        features = self.backbone(pixels)
        if self.intensity:
            h, w = features.tensor.shape[1:3]
            features = replace(features, intensity=patch_gray(pixels, (h, w)).to(self.backbone.device))
        masks = [one.mask for one in waiting if one.mask is not None]
        if masks:
            features = replace(features, masks=torch.stack(masks).to(features.tensor.device))
        self.timed("backbone", start)
        return Batch([one.source for one in waiting], [one.size for one in waiting], features)

    def _batch_size(self, pixels: Tensor, image: RGB) -> int:
        """Fill a quarter of the free memory.

        Activations take about 64 times the bytes of the pixels, the map of an image four times its own.
        """
        needed = 64 * pixels.numel() * 4 + 4 * int(image.shape[0] * image.shape[1]) * 4
        if self.backbone.device.type == "cuda":
            free, most = int(torch.cuda.mem_get_info(self.backbone.device)[0]), 32
        else:
            free, most = _free_memory(), 8
        return max(1, min(most, free // 4 // needed))


def _free_memory() -> int:
    """Give the bytes that this machine has left, 2 GiB where it does not tell."""
    table = Path("/proc/meminfo")
    lines = table.read_text(encoding="ascii").splitlines() if table.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 2**31)
