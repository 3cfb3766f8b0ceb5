"""BMAD's sets with pixel masks, in every layout in circulation: BraTS2021, liver (hist_DIY) and RESC.

What is looked for, in any case of letters:

* splits: `train`; `valid` or `val`; `test`; or one folder deeper, `Train/train`, `Val/val`, `Test/test`
* classes: `good` and `Ungood`
* images of a class: `class/img`, `img/class` or `class`
* masks: `class/label`, `class/anomaly_mask`, `label/class` or, beside the split, `<split>_label/class`

Image and mask share the stem of their names.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from dinofast.data.nifti import SUFFIXES as NIFTI_SUFFIXES
from dinofast.data.sample import Mask, Sample
from dinofast.data.sources import SUFFIXES
from dinofast.errors import BadFilesError, InputError
from dinofast.imaging import decode, decode_mask, digest, image_size

SPLITS = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}
CLASSES = ("good", "ungood")
MASK_RULES = ("any", "255")
"""How a mask file is read. "any": a pixel is anomalous when any color channel is above 0, alpha ignored; all
levels of a multi-level mask count. "255": only where the gray value is 255, which keeps the top level alone,
as the DPMM's and anomalib 0.6's metrics do."""

LABEL_RULES = ("folder", "mask")
"""Where an image's label comes from: its class folder, or whether its mask marks a pixel. BraTS2021 takes its
Ungood slices on a fixed grid, so that some may show no tumor."""

NAMES = {
    "brain": ("brats2021_slice", "brats2021", "brats", "brain_ad", "brain"),
    "liver": ("hist_diy", "liver_ad", "liver"),
    "resc": ("resc", "retina_resc_ad"),
}
"""Sets, and what their folders are called in any case."""

PUBLISHED_COUNTS: dict[str, dict[str, dict[str, int]]] = {
    "brain": {
        "BMAD": {
            "train/good": 7500,
            "valid/good": 39,
            "valid/ungood": 44,
            "test/good": 640,
            "test/ungood": 3075,
        }
    },
    "liver": {
        "BMAD": {
            "train/good": 1542,
            "valid/good": 93,
            "valid/ungood": 73,
            "test/good": 833,
            "test/ungood": 660,
        }
    },
    "resc": {
        "BMAD": {
            "train/good": 4297,
            "valid/good": 45,
            "valid/ungood": 70,
            "test/good": 1041,
            "test/ungood": 764,
        },
        "DPMM": {
            "train/good": 4297,
            "valid/good": 70,
            "valid/ungood": 45,
            "test/good": 1041,
            "test/ungood": 764,
        },
    },
}
"""Images of each split and class by source: BMAD's code (arXiv 2306.11876), and the totals in the DPMM paper
(arXiv 2509.19997, section 3.1.2), which imply 45 and 70 the other way round for RESC."""

_DEPTH = 4
_IGNORED = ("__macosx",)
_LOG = logging.getLogger("dinofast.data")


@dataclass(frozen=True)
class BMAD:
    """One set, listed; nothing is held but names.

    Attributes:
        name: "brain", "liver" or "resc"; None when neither the caller nor a folder's name tells.
        root: the folder that holds the splits.
        train: normal images, label 0, without masks.
        valid: normal and anomalous images with masks, sorted by class and name.
        test: likewise.
        counts: "split/class" -> number of images, by folder.
        folders: "split/class" -> where images and masks were found, relative to `root`.
        mask_rule: one of `MASK_RULES`.
        labels: one of `LABEL_RULES`.
        lone_masks: masks without an image, relative to `root`.
    """

    name: str | None
    root: Path
    train: list[Sample] = field(repr=False)
    valid: list[Sample] = field(repr=False)
    test: list[Sample] = field(repr=False)
    counts: dict[str, int]
    folders: dict[str, str] = field(repr=False)
    mask_rule: str
    labels: str
    lone_masks: list[str] = field(repr=False)

    def splits(self) -> dict[str, list[Sample]]:
        """Give the three lists by name."""
        return {"train": self.train, "valid": self.valid, "test": self.test}

    def differences(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Compare the counts with the published ones.

        Returns:
            Source -> "split/class" -> (found, published), where they differ; a source with an empty entry
            agrees. Empty when the set is unknown.
        """
        return {
            source: {
                part: (self.counts.get(part, 0), published)
                for part, published in table.items()
                if self.counts.get(part, 0) != published
            }
            for source, table in PUBLISHED_COUNTS.get(self.name or "", {}).items()
        }


def load(
    root: str | os.PathLike[str], name: str | None = None, *, mask_rule: str = "any", labels: str = "folder"
) -> BMAD:
    """List one BMAD set, whatever its layout.

    Args:
        root: the folder with the splits, or one up to four levels above it, such as an unpacked zip.
        name: which set it is; None reads it from the folders' names.
        mask_rule: one of `MASK_RULES`.
        labels: one of `LABEL_RULES`; "mask" reads every mask of valid and test now.

    Returns:
        The set. A good image without mask has an empty one; masks are read when asked for, and raise
        InputError when their size is not that of their image.

    Raises:
        InputError: no such folder, no set or several below it, a layout that is not known, an empty train, a
            split without good images, a test without Ungood ones, Ungood images in train, two images or masks
            of one stem, or an unknown name or rule.
        BadFilesError: Ungood images without their mask; each is named.

    References:
        Bao et al., BMAD: Benchmarks for Medical Anomaly Detection, CVPR Workshops 2024, arXiv 2306.11876.
    """
    for value, known, what in (
        (mask_rule, MASK_RULES, "mask rule"),
        (labels, LABEL_RULES, "labels"),
        (name, (None, *NAMES), "set"),
    ):
        if value not in known:
            raise InputError(f"{what} {value!r}: one of {', '.join(k for k in known if k)}")
    top = Path(root)
    if not top.is_dir():
        raise InputError(f"{top}: no such folder; give the one that holds train, valid and test")
    base = _set_root(top)
    found: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    counts, folders, lone = dict[str, int](), dict[str, str](), list[str]()
    missing: dict[str, str] = {}
    for split, names in SPLITS.items():
        tree = _split(base, names)
        if tree is None:
            raise InputError(
                f"{base}: has no {' or '.join(names)} folder; unpack the set again, or move normal images "
                f"that the fit shall not see to {split}/good"
            )
        for kind in CLASSES:
            part = f"{split}/{kind}"
            images = _images(tree, kind)
            files = {} if images is None else _by_stem(images)
            counts[part] = len(files)
            _refuse(split, kind, tree, images, len(files))
            if images is None or not files:
                continue
            masks = None if split == "train" else _masks(tree, kind)
            mask_files = {} if masks is None else _by_stem(masks)
            folders[part] = _relative(images, base) + (f", masks {_relative(masks, base)}" if masks else "")
            lone += [_relative(mask_files[stem], base) for stem in mask_files.keys() - files.keys()]
            for stem, file in files.items():
                mask_file = mask_files.get(stem)
                if mask_file is None and kind == "ungood":
                    missing[str(file)] = (
                        f"no mask {stem}.* in {masks}"
                        if masks
                        else f"no label or anomaly_mask folder in {tree}"
                    )
                reader = None if split == "train" else partial(_mask, file, mask_file, mask_rule)
                label = CLASSES.index(kind)
                if labels == "mask" and reader is not None and str(file) not in missing:
                    label = int(reader().any())
                found[split].append(Sample(str(file), partial(decode, file), reader, label, file))
    if missing:
        raise BadFilesError(missing, "Fetch the set again; anomalous images need their masks.")
    if lone:
        _LOG.warning("%s: %d masks have no image, %s among them", base, len(lone), min(lone))
    return BMAD(
        name or _name(base, top), base, **found, counts=counts, folders=folders, mask_rule=mask_rule,
        labels=labels, lone_masks=sorted(lone),
    )  # fmt: skip


def overlap(
    splits: Mapping[str, Sequence[Sample]],
    fingerprint: Callable[[Sample], bytes] = lambda sample: digest(sample.load()),
) -> dict[str, list[tuple[str, str]]]:
    """Find images that occur in two splits, by a hash of their decoded pixels.

    Args:
        splits: name -> images; by default each is read once, none is kept.
        fingerprint: gives an image's hash, for callers that know it already.

    Returns:
        "first & second" -> pairs of sources with equal pixels, for splits that share any. Of copies within
        one split the first is named.

    Raises:
        InputError: an image cannot be read.
    """
    holders: defaultdict[bytes, dict[str, str]] = defaultdict(dict)
    for split, images in splits.items():
        for sample in images:
            holders[fingerprint(sample)].setdefault(split, sample.source)
    shared: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for where in holders.values():
        for first, second in combinations((split for split in splits if split in where), 2):
            shared[f"{first} & {second}"].append((where[first], where[second]))
    return {pair: sorted(sources) for pair, sources in sorted(shared.items())}


def _set_root(top: Path) -> Path:
    level = [top]
    for _ in range(_DEPTH + 1):
        found = [folder for folder in level if _is_root(folder)]
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(
                f"{top}: holds several sets, {', '.join(map(str, found))}; give one of these folders"
            )
        level = [child for folder in level for child in _children(folder)]
    raise InputError(
        f"{top}: no known layout; looked for train/good, valid/good, test/good and test/Ungood, with img and "
        f"label folders or <split>_label beside them, in it and up to {_DEPTH} levels below. It holds "
        + (", ".join(child.name for child in _children(top)) or "no folders")
    )


def _is_root(folder: Path) -> bool:
    train = _split(folder, SPLITS["train"])
    normal = None if train is None else _images(train, "good")
    return normal is not None and _split(folder, SPLITS["test"]) is not None


def _split(base: Path, names: Sequence[str]) -> Path | None:
    """Find `train` or `Train/train`."""
    outer = _child(base, *names)
    inner = None if outer is None else _child(outer, *names)
    return inner or outer


def _images(tree: Path, kind: str) -> Path | None:
    return _only(tree, f"{kind} images", [(kind, "img"), ("img", kind)]) or _child(tree, kind)


def _masks(tree: Path, kind: str) -> Path | None:
    beside = _child(tree.parent, f"{tree.name.lower()}_label")
    found = None if beside is None else _child(beside, kind)
    inside = [(kind, "label"), (kind, "anomaly_mask"), ("label", kind)]
    return _only(tree, f"{kind} masks", inside, [found] if found else [])


def _only(
    tree: Path, what: str, places: Sequence[tuple[str, str]], known: Sequence[Path] = ()
) -> Path | None:
    """Give the one folder of `places` (outer, inner) below `tree` that exists."""
    found = list(known)
    for outer, inner in places:
        parent = _child(tree, outer)
        folder = None if parent is None else _child(parent, inner)
        if folder is not None:
            found.append(folder)
    if len(found) > 1:
        raise InputError(f"{tree}: {what} in several folders, {', '.join(map(str, found))}; keep one of them")
    return found[0] if found else None


def _child(folder: Path, *names: str) -> Path | None:
    found = [child for child in _children(folder) if child.name.lower() in names]
    if len(found) > 1:
        listed = ", ".join(child.name for child in found)
        raise InputError(f"{folder}: holds {listed}, which mean the same here; keep one of them")
    return found[0] if found else None


def _children(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    return [folder / name for name in sorted(names) if name.lower() not in _IGNORED]


def _refuse(split: str, kind: str, tree: Path, images: Path | None, count: int) -> None:
    """Raise InputError for a class that must hold images and does not, or the other way round."""
    place = images or tree / kind
    if split == "train" and kind == "ungood" and count:
        raise InputError(
            f"{place}: {count} anomalous images in train; only normal ones are learned, move them"
        )
    needed = kind == "good" or split == "test"
    if needed and not count:
        purpose = {"train": "learned", "valid": "used for the thresholds", "test": "scored"}[split]
        raise InputError(
            f"{place}: holds no images, and {kind} images of {split} are {purpose}; unpack the set again"
        )


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_file() and not e.name.startswith("."))
    for name in names:
        if name.lower().endswith(SUFFIXES) and not name.lower().endswith(NIFTI_SUFFIXES):
            path = folder / name
            if path.stem in found:
                raise InputError(f"{path}: {found[path.stem].name} has the same stem; keep one of the two")
            found[path.stem] = path
    return found


def _mask(image_file: Path, mask_file: Path | None, rule: str) -> Mask:
    size = image_size(image_file)
    if mask_file is None:
        return np.zeros(size, np.bool_)
    if rule == "255":
        mask: Mask = np.asarray(Image.fromarray(decode(mask_file)).convert("L")) == 255
    else:
        mask = decode_mask(mask_file)
    if mask.shape != size:
        raise InputError(
            f"{mask_file}: its size (H, W) = {mask.shape} is not that of {image_file}, {size}; export it anew"
        )
    return mask


def _name(base: Path, top: Path) -> str | None:
    """Tell the set from the names of its folders, from the innermost outward to the one that was given."""
    for folder in (base, *base.parents):
        for name, known in NAMES.items():
            if folder.resolve().name.lower() in known:
                return name
        if folder == top:
            break
    return None


def _relative(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix()
