"""Predictions as files: float maps, overlays, volumes on the input's grid, and one table of scores."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinofast.data import Sample, VolumeSlice
from dinofast.errors import InputError
from dinofast.figures import color_scale, overlay_png, require_matplotlib
from dinofast.files import replacing
from dinofast.types import Prediction

if TYPE_CHECKING:
    from dinofast.detector import Detector
    from dinofast.progress import Progress


class Writer:
    """Write predictions into a folder as they come; a context manager that ends with `scores.json`.

    A plain image `a.png` gives `a_map.tif` (32-bit float, its own size) and, with a threshold,
    `a_overlay.png`. The slices of a volume `scan.nii.gz` give `scan_map.nii.gz` with its affine and shape,
    when the last of them has come; a run that is stopped before that gives none. Slices that are not among
    the images are 0 there.

    Args:
        folder: where to write; it is made.
        images: all images that will come.
        threshold: pixel threshold, drawn as a contour and the middle of the color scale; None draws nothing.

    Raises:
        InputError: the folder cannot be written, one of the images lies where a file would be written, or
            overlays are to be drawn and matplotlib is missing.
    """

    def __init__(
        self, folder: str | os.PathLike[str], images: Iterable[Sample], threshold: float | None = None
    ) -> None:
        self.folder, self.threshold = Path(folder), threshold
        self._images = list(images)  # held, so that no other image gets the id of one
        if threshold is not None and any(sample.volume is None for sample in self._images):
            require_matplotlib()
        self._names = _file_names(self._images)
        self._slices: dict[Hashable, dict[int, NDArray[np.float32]]] = {}
        self._awaited: dict[Hashable, set[int]] = {}
        self.rows: list[dict[str, Any]] = []
        inputs = {sample.path.absolute() for sample in self._images if sample.path is not None}
        for sample in self._images:
            key, endings = _key(sample), ["_map.tif", "_overlay.png"]
            if sample.volume is not None:
                self._awaited.setdefault(key, set()).add(sample.volume.index)
                endings = ["_map.nii.gz"]
            for target in ((self.folder / (self._names[key] + ending)).absolute() for ending in endings):
                if target in inputs:
                    raise InputError(
                        f"{target}: an input, and it would be overwritten; choose another folder"
                    )
        self._write_rows()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        unwritten = {f"{self._names[key]}_map.nii.gz" for key in self._slices}
        for row in self.rows:
            if row["map"] in unwritten:
                row["map"] = None
        self._write_rows()

    def write(self, sample: Sample, prediction: Prediction) -> None:
        """Write one image's files.

        Raises:
            InputError: the folder cannot be written.
        """
        name = self._names[_key(sample)]
        map = prediction.map.numpy()
        row: dict[str, Any] = {
            "source": prediction.source,
            "score": prediction.score,
            "is_anomalous": prediction.is_anomalous,
            "anomalous_share": None if prediction.mask is None else float(prediction.mask.float().mean()),
        }
        if sample.volume is None:
            with replacing(self.folder / f"{name}_map.tif") as temporary:
                Image.fromarray(map).save(temporary, format="TIFF")
            row["map"] = f"{name}_map.tif"
            if self.threshold is not None:
                picture = overlay_png(
                    sample.load(),
                    map,
                    scale=color_scale([], self.threshold),
                    opacity=0.4,
                    threshold=self.threshold,
                    name=sample.source,
                    width=512,
                )
                with replacing(self.folder / f"{name}_overlay.png") as temporary:
                    temporary.write_bytes(picture)
                row["overlay"] = f"{name}_overlay.png"
        else:
            row["map"] = f"{name}_map.nii.gz"
            self._slice(_key(sample), sample.volume, map, self.folder / row["map"])
        self.rows.append(row)

    def _slice(self, key: Hashable, place: VolumeSlice, map: NDArray[np.float32], path: Path) -> None:
        kept = self._slices.setdefault(key, {})
        kept[place.index] = map
        if set(kept) == self._awaited[key]:
            place.volume.write(list(kept.values()), path, list(kept))
            del self._slices[key]

    def _write_rows(self) -> None:
        with replacing(self.folder / "scores.json") as temporary:
            temporary.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")


def _file_names(images: Iterable[Sample]) -> dict[Hashable, str]:
    """Give every file, volume or image in memory a name of its own.

    Folders below the common one are joined by __; endings stay only where names would be equal without them,
    and what is equal even so is numbered.
    """
    firsts: dict[Hashable, Sample] = {}
    for sample in images:
        firsts.setdefault(_key(sample), sample)
    paths = {key: sample.path.absolute() for key, sample in firsts.items() if sample.path is not None}
    root = os.path.commonpath([path.parent for path in paths.values()]) if paths else ""
    names: dict[Hashable, str] = {}
    for key, sample in firsts.items():
        in_memory = sample.source.rstrip("]") or "image"
        plain = os.path.relpath(paths[key], root).replace(os.sep, "__") if key in paths else in_memory
        names[key] = re.sub(r"[^\w.-]+", "_", plain)
    short = {key: re.sub(r"(\.nii\.gz|\.[A-Za-z0-9]{1,5})$", "", name) for key, name in names.items()}
    equal, taken = Counter(name.casefold() for name in short.values()), set[str]()
    for key, name in short.items():
        first = name = name if equal[name.casefold()] == 1 else names[key]
        number = 1
        while name.casefold() in taken:
            number += 1
            name = f"{first}-{number}"
        taken.add(name.casefold())
        names[key] = name
    return names


def _key(sample: Sample) -> Hashable:
    """Tell one file, one slicing of a volume or one image in memory from all others."""
    if sample.path is None:
        return id(sample)
    return sample.path.absolute(), None if sample.volume is None else sample.volume.volume.axis


def write_predictions(
    detector: Detector,
    images: Any,
    folder: str | os.PathLike[str],
    *,
    batch_size: int | None = None,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Predict images and write their maps, overlays and `scores.json` into a folder, as `Writer` does.

    Every file is read once before the work begins, so a bad one stops the run before anything is written.

    Args:
        detector: fitted.
        images: whatever `dinofast.data.samples` takes.
        folder: where to write.
        batch_size: images at a time; None chooses from free memory.
        skip_bad: leave out files that cannot be used, with a warning each.
        progress: called as progress(stage, done, total).

    Returns:
        One row an image: source, score, is_anomalous, share of anomalous pixels, names of its files.

    Raises:
        BadFilesError: files that cannot be used, all named.
        InputError: the detector is not fitted, no images, or what `Writer` says.
    """
    good = detector.check(images, skip_bad=skip_bad, progress=progress)
    pixel = detector.thresholds.get("pixel")
    with Writer(folder, good, None if pixel is None else pixel.value) as writer:
        predictions = detector.predict(good, batch_size=batch_size, progress=progress)
        for sample, prediction in zip(good, predictions, strict=True):
            writer.write(sample, prediction)
    return writer.rows
