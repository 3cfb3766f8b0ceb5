"""Predictions as files: float maps, overlays, volumes on the input's grid, and one table of scores."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinofast import data
from dinofast.data import Sample, VolumeSlice
from dinofast.figures import overlay_png
from dinofast.files import replacing
from dinofast.types import Prediction

if TYPE_CHECKING:
    from dinofast.detector import Detector
    from dinofast.progress import Progress


class Writer:
    """Write predictions into a folder as they come; a context manager that ends with `scores.json`.

    A plain image `a.png` gives `a_map.tif` (32-bit float, its own size) and, with a threshold,
    `a_overlay.png`. The slices of a volume `scan.nii.gz` give `scan_map.nii.gz` with its affine and shape,
    when the last of them has come.

    Args:
        folder: where to write; it is made.
        images: all images that will come, in order.
        threshold: pixel threshold, drawn as a contour and the middle of the color scale; None draws nothing.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike[str], images: Iterable[Sample], threshold: float | None = None
    ) -> None:
        self.folder, self.threshold = Path(folder), threshold
        images = list(images)
        self._names = _file_names(images)
        self._expected = Counter(_key(s) for s in images)
        self._slices: dict[str, list[tuple[int, NDArray[np.float32]]]] = {}
        self.rows: list[dict[str, Any]] = []
        with replacing(self.folder / "scores.json") as temporary:
            temporary.write_text("[]\n")

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        with replacing(self.folder / "scores.json") as temporary:
            temporary.write_text(json.dumps(self.rows, indent=1) + "\n")

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
                    scale=(0.0, 2 * self.threshold),
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
            self._slice(sample, sample.volume, map, self.folder / row["map"])
        self.rows.append(row)

    def _slice(self, sample: Sample, place: VolumeSlice, map: NDArray[np.float32], path: Path) -> None:
        kept = self._slices.setdefault(_key(sample), [])
        kept.append((place.index, map))
        if len(kept) == self._expected[_key(sample)]:
            place.volume.write([m for _, m in kept], path, [i for i, _ in kept])
            del self._slices[_key(sample)]


def _file_names(images: Iterable[Sample]) -> dict[str, str]:
    """Give every file or array a name of its own: folders below the common one joined by __, no suffix."""
    keys = list(dict.fromkeys(_key(sample) for sample in images))
    root = os.path.commonpath([Path(key).parent for key in keys]) if keys else ""
    plain = {key: re.sub(r"[^\w.-]+", "_", os.path.relpath(key, root).replace(os.sep, "__")) for key in keys}
    short = {key: re.sub(r"(\.nii\.gz|\.[A-Za-z0-9]{1,5})$", "", name) for key, name in plain.items()}
    taken = Counter(short.values())
    return {key: short[key] if taken[short[key]] == 1 else plain[key] for key in keys}


def _key(sample: Sample) -> str:
    return str(Path(sample.path or sample.source).absolute())


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
        InputError: the detector is not fitted, no images, or the folder cannot be written.
    """
    good = data.check(data.samples(images), skip_bad=skip_bad)
    pixel = detector.thresholds.get("pixel")
    with Writer(folder, good, None if pixel is None else pixel.value) as writer:
        predictions = detector.predict(good, batch_size=batch_size, progress=progress)
        for sample, prediction in zip(good, predictions, strict=True):
            writer.write(sample, prediction)
    return writer.rows
