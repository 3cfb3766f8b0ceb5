"""From whatever a caller holds (paths, folders, globs, arrays, volumes) to a list of samples."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dinofast.data.nifti import SUFFIXES as NIFTI_SUFFIXES
from dinofast.data.nifti import Volume, volume
from dinofast.data.sample import Sample
from dinofast.errors import BadFilesError, InputError
from dinofast.imaging import RGB, as_rgb, decode

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp", *NIFTI_SUFFIXES)
"""Endings, in any case, of the files that a folder is searched for. A single file may have any other."""

_LOG = logging.getLogger("dinofast.data")


def samples(
    source: Any,
    *,
    axis: str | int = "axial",
    window: tuple[float, float] | None = None,
    percentiles: tuple[float, float] = (0.5, 99.5),
    nonfinite: str = "error",
) -> list[Sample]:
    """List the images that `source` stands for; nothing but headers of NIfTI files is read.

    Args:
        source: a path of an image or of a NIfTI volume (.nii, .nii.gz: every slice is an image); a folder,
            searched recursively for `SUFFIXES`, files sorted by path as plain text, hidden ones left out; a
            glob, `**` included, with the same rules; an array (H, W), (H, W, 1 | 3 | 4) or a batch
            (B, H, W, 1 | 3 | 4); a Pillow image; a tensor (H, W), (1 | 3 | 4, H, W) or a batch
            (B, 1 | 3 | 4, H, W); a `Volume`; a `Sample`; or an iterable of these. An iterator of arrays is
            held in memory.
        axis: how volumes are sliced, see `volume`.
        window: see `volume`.
        percentiles: see `volume`.
        nonfinite: see `volume`.

    Returns:
        At least one sample. Labels and masks are unknown, except for those that came as samples or volumes.

    Raises:
        InputError: nothing found, no such file, a NIfTI header that cannot be used, or a type or shape that
            is no image. Pixels are judged later: by `check`, or by `Sample.load`.

    >>> [s.source for s in samples(np.zeros((2, 8, 8, 3), np.uint8))]
    ['array[0]', 'array[1]']
    """
    read = partial(volume, axis=axis, window=window, percentiles=percentiles, nonfinite=nonfinite)
    found = list(_expand(source, read, ""))
    if not found:
        raise InputError(f"no images: an empty {type(source).__name__} was given; give at least one image")
    return found


def _expand(source: Any, read: Callable[[Path], Volume], position: str) -> Iterator[Sample]:
    if isinstance(source, Sample):
        yield source
    elif isinstance(source, Volume):
        yield from source.samples()
    elif isinstance(source, (str, os.PathLike)):
        for path in _files(os.fspath(source)):
            if path.name.lower().endswith(NIFTI_SUFFIXES):
                yield from read(path).samples()
            else:
                yield Sample(str(path), partial(decode, path), path=path)
    elif isinstance(source, (np.ndarray, torch.Tensor)):
        name = ("array" if isinstance(source, np.ndarray) else "tensor") + position
        if source.ndim not in (2, 3, 4):
            raise InputError(
                f"{name}: shape {tuple(source.shape)} is no image; give (H, W), color or a batch of them"
            )
        batch = source if source.ndim == 4 else [source]
        for i, image in enumerate(batch):
            label = f"{name}[{i}]" if source.ndim == 4 else name
            yield Sample(label, partial(as_rgb, image, label))
    elif isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or f"image{position}"
        yield Sample(name, partial(as_rgb, source, name))
    elif isinstance(source, Iterable):
        for i, item in enumerate(source):
            yield from _expand(item, read, f"{position}[{i}]")
    else:
        raise InputError(
            f"cannot use {type(source).__name__} as images; give a path, folder, glob, array, tensor, Pillow "
            "image, or a list of these"
        )


def _files(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return image_files(path)
    if not glob.has_magic(name):
        raise InputError(f"{name}: no such file or folder; give a path that exists")
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    found = _usable(map(Path, matches))
    if not found:
        raise InputError(f"{name}: no image matches; looked for files ending in {', '.join(SUFFIXES)}")
    return found


def image_files(folder: Path) -> list[Path]:
    """List every file below `folder` that ends in one of `SUFFIXES`, sorted; hidden ones are left out.

    Raises:
        InputError: there is none.
    """
    found = _usable(
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise InputError(f"{folder}: holds no images; looked for files ending in {', '.join(SUFFIXES)}")
    return found


def _usable(paths: Iterable[Path]) -> list[Path]:
    return sorted((p for p in paths if p.name.lower().endswith(SUFFIXES) and p.is_file()), key=Path.as_posix)


def shots(images: Iterable[Sample], k: int, seed: int = 0) -> list[Sample]:
    """Choose k samples for a few-shot fit, as AnomalyDINO does: the seed-th run of k in sorted order.

    Files are sorted by path as plain text, slices of one volume by index; images in memory keep their order.

    Args:
        images: normal samples.
        k: how many, at least 1.
        seed: which run, from 0: samples seed·k to (seed + 1)·k − 1.

    Returns:
        k samples.

    Raises:
        InputError: k < 1, seed < 0, or the run ends behind the last sample.

    References:
        Damm et al., AnomalyDINO, WACV 2025, arXiv 2405.14529.
    """
    ordered = sorted(
        images,
        key=lambda s: (s.path.as_posix() if s.path else "", s.volume.index if s.volume else 0),
    )
    if k < 1 or seed < 0:
        raise InputError(f"shots: k = {k} and seed = {seed}; k is at least 1 and seed at least 0")
    chosen = ordered[seed * k : (seed + 1) * k]
    if len(chosen) < k:
        raise InputError(
            f"shots: k = {k} with seed = {seed} needs {(seed + 1) * k} normal images and there are "
            f"{len(ordered)}; lower k or the seed"
        )
    return chosen


def judged(sample: Sample, accept: Callable[[RGB], object] | None = None) -> RGB:
    """Read an image and refuse it when it is blank, as `check` does of all.

    Args:
        sample: image to read.
        accept: called with the pixels; raises InputError when they are of no use to the caller.

    Returns:
        uint8 (H, W, 3).

    Raises:
        InputError: named; the image cannot be read, is of one color and no slice, or is not accepted.
    """
    image = sample.load()
    try:
        if sample.volume is None and (image == image[0, 0]).all():
            raise InputError("every pixel has the same color: blank or corrupt; remove it")
        if accept is not None:
            accept(image)
    except InputError as error:
        raise InputError(f"{sample.source}: {error}") from error
    return image


def check(
    images: Sequence[Sample],
    *,
    skip_bad: bool = False,
    accept: Callable[[RGB], object] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """Read every image and mask once, so that a bad file stops the run before any work is lost.

    Bad is what cannot be read, a mask of another size, and an image whose pixels are all of one color: it is
    blank or corrupt. Slices of a volume may be of one color (air); a whole volume may not.

    Args:
        images: samples.
        skip_bad: leave bad files out, with a warning in the log `dinofast.data` for each, instead of raising.
            A bad volume is left out with all its slices.
        accept: see `judged`.
        progress: called as progress(done, total) after each image.

    Returns:
        The good samples, in order.

    Raises:
        BadFilesError: names every bad file; also with `skip_bad` when no good one is left.
    """
    bad: dict[str, str] = {}
    good = []
    for done, sample in enumerate(images, 1):
        name = str(sample.path or sample.source)
        if not (sample.volume and name in bad):
            try:
                judged(sample, accept)
                sample.mask()
                good.append(sample)
            except InputError as error:
                bad[name] = str(error).removeprefix(f"{name}: ")
        if progress is not None:
            progress(done, len(images))
    if bad and not skip_bad:
        raise BadFilesError(
            bad, "Repair or remove them, or leave them out with --skip-bad (skip_bad=True in Python)."
        )
    if not good:
        raise BadFilesError(bad, "No usable image is left.")
    for name, reason in bad.items():
        _LOG.warning("skipped %s: %s", name, reason)
    return [s for s in good if s.volume is None or str(s.path) not in bad]


def reading(images: Iterable[Sample]) -> dict[str, Any]:
    """Tell how the volumes among images were read, as arguments of `samples`.

    Returns:
        axis, window and percentiles; empty without volumes, or when they were not all read alike.
    """
    volumes = (sample.volume.volume for sample in images if sample.volume is not None)
    found = {(volume.axis, volume.window, volume.percentiles) for volume in volumes}
    return dict(zip(("axis", "window", "percentiles"), *found, strict=True)) if len(found) == 1 else {}
