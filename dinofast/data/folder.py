"""Image folders whose names tell normal from anomalous: good/bad trees and the MVTec AD layout."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np

from dinofast.data.nifti import SUFFIXES as NIFTI_SUFFIXES
from dinofast.data.sample import Mask, Sample
from dinofast.data.sources import image_files
from dinofast.errors import BadFilesError, InputError
from dinofast.imaging import decode, decode_mask, image_size

NORMAL = ("good", "no", "normal", "ok")
"""Names, in any case, of the folders that hold normal images; every other folder holds anomalous ones."""

_TRUTH = "ground_truth"


def folder(root: str | os.PathLike[str], split: str | None = None) -> list[Sample]:
    """List the images of a labeled tree, with labels and, where there are, ground-truth masks.

    Two layouts are known. A good/bad tree: `root/<class>/...`, normal classes named as in `NORMAL`. Or the
    same trees in `root/train` and `root/test`; with `root/ground_truth/<class>/<stem>_mask.png` for every
    anomalous image this is the MVTec AD layout. Classes are searched recursively, files sorted by path.

    Args:
        root: the folder.
        split: "train" or "test" for one of these trees, None for all there are.

    Returns:
        Samples with label 0 or 1. With a `ground_truth` folder every sample has a mask: empty for normal
        images, the pixels that are not 0 for others (see `imaging.decode_mask`). Without, none has. Reading
        an anomalous image's mask raises InputError when it is empty or of another size.

    Raises:
        InputError: no such folder or split, no class folders, none of them normal, or an empty class.
        BadFilesError: anomalous images without their mask file; each is named with the mask it lacks.

    References:
        Bergmann et al., MVTec AD, CVPR 2019.
    """
    top = Path(root)
    if not top.is_dir():
        raise InputError(
            f"{top}: no such folder; give the one that holds good/ and bad/, or train/ and test/"
        )
    if split not in (None, "train", "test"):
        raise InputError(f"split {split!r}: one of 'train', 'test', None")
    trees = [top / name for name in ("train", "test") if (top / name).is_dir()] or [top]
    classes = {tree: _class_folders(tree) for tree in trees}
    names = sorted({path.name for paths in classes.values() for path in paths})
    if not any(_is_normal(name) for name in names):
        found = f"its folders are {', '.join(names)}" if names else "it holds no folders"
        raise InputError(f"{top}: no normal class; {found}; name one {', '.join(NORMAL)}")
    if split is not None:
        if top / split not in classes:
            raise InputError(f"{top}: has no folder {split!r}; leave split out to read the whole tree")
        classes = {top / split: classes[top / split]}
    truth = top / _TRUTH
    found_samples, missing = [], {}
    for path in (path for paths in classes.values() for path in paths):
        label = 0 if _is_normal(path.name) else 1
        for file in image_files(path):
            if file.name.lower().endswith(NIFTI_SUFFIXES):
                raise InputError(f"{file}: volumes carry their truth in mask files; open it with data.volume")
            mask_file = truth / file.relative_to(path.parent).parent / f"{file.stem}_mask.png"
            if truth.is_dir() and label and not mask_file.is_file():
                missing[str(file)] = f"no mask at {mask_file}"
            reader = partial(_mask, file, mask_file if label else None) if truth.is_dir() else None
            found_samples.append(Sample(str(file), partial(decode, file), reader, label, file))
    if missing:
        raise BadFilesError(missing, f"Add the masks, or remove {truth} to do without masks.")
    return found_samples


def _class_folders(tree: Path) -> list[Path]:
    return sorted(p for p in tree.iterdir() if p.is_dir() and p.name != _TRUTH and not p.name.startswith("."))


def _is_normal(name: str) -> bool:
    return name.lower() in NORMAL


def _mask(image_file: Path, mask_file: Path | None) -> Mask:
    size = image_size(image_file)
    if mask_file is None:
        return np.zeros(size, np.bool_)
    mask: Mask = decode_mask(mask_file)
    if mask.shape != size:
        raise InputError(
            f"{mask_file}: its size (H, W) = {mask.shape} is not that of {image_file}, {size}; export it anew"
        )
    if not mask.any():
        raise InputError(
            f"{mask_file}: marks no pixel, and {image_file} is in a folder of anomalous images; "
            "export the mask anew, or move the image to a normal class"
        )
    return mask
