"""A DICOM CT series and its segmentation as NIfTI; what the lung demo needs, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dinofast.errors import InputError

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_series(files: Sequence[Path]) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float64], list[str]]:
    """Read the slices of one CT series, sorted by position along their common normal.

    Args:
        files: one file a slice, in any order.

    Returns:
        Hounsfield units (X, Y, Z), X along an image's rows and Y down its columns, padding raised to −1024;
        the affine to millimeters in RAS (4, 4); the SOP instance UID of each of the Z slices.

    Raises:
        InputError: no files, a file that is not CT, slices that differ in size, orientation, spacing or
            series, or that are not evenly spaced, or pydicom is missing.
    """
    slices = [_read(file) for file in files]
    if len(slices) < 2:
        raise InputError(f"{len(slices)} DICOM slices; a series needs at least 2")
    first = slices[0]
    for file, item in zip(files, slices, strict=True):
        if item.get("Modality") != "CT":
            raise InputError(f"{file}: modality {item.get('Modality')}, not CT")
        for key in ("SeriesInstanceUID", "Rows", "Columns", "ImageOrientationPatient", "PixelSpacing"):
            if item[key].value != first[key].value:
                raise InputError(f"{file}: its {key} is not that of {files[0]}; give one series")
    to_right, down = np.asarray(first.ImageOrientationPatient, np.float64).reshape(2, 3)
    normal = np.cross(to_right, down)
    places = np.asarray([item.ImagePositionPatient for item in slices], np.float64)
    order = np.argsort(places @ normal, kind="stable")
    steps = np.diff(places[order], axis=0)
    if not np.allclose(steps, steps.mean(axis=0), atol=1e-2) or not steps.any():
        raise InputError(f"{files[0].parent}: slices are not evenly spaced; one is missing or doubled")
    row_step, column_step = (float(v) for v in first.PixelSpacing)
    affine = np.eye(4)
    affine[:3] = np.column_stack(
        [to_right * column_step, down * row_step, steps.mean(axis=0), places[order[0]]]
    )
    volume = np.stack([_hounsfield(slices[i]) for i in order], axis=-1)
    return volume, _LPS_TO_RAS @ affine, [str(slices[i].SOPInstanceUID) for i in order]


def _hounsfield(item: Any) -> npt.NDArray[np.int16]:
    values = item.pixel_array.T * float(item.RescaleSlope) + float(item.RescaleIntercept)
    hounsfield: npt.NDArray[np.int16] = np.maximum(np.rint(values), -1024).astype(np.int16)
    return hounsfield


def read_segment(
    file: Path, uids: Sequence[str], size: tuple[int, int], *, label: str, algorithm: str
) -> npt.NDArray[np.uint8]:
    """Read one segment of a DICOM segmentation, each frame put on the slice that it refers to.

    Args:
        file: the segmentation.
        uids: SOP instance UID of each slice of the volume, in its order.
        size: (X, Y) of the volume.
        label: label of the segment.
        algorithm: how it was made: "MANUAL", "SEMIAUTOMATIC" or "AUTOMATIC".

    Returns:
        1 in the segment, 0 elsewhere (X, Y, Z).

    Raises:
        InputError: no such segment, a frame of another size, one that refers to no slice of the volume, or
            pydicom is missing.
    """
    data = _read(file)
    numbers = [
        int(s.SegmentNumber)
        for s in data.get("SegmentSequence", [])
        if (s.SegmentLabel, s.SegmentAlgorithmType) == (label, algorithm)
    ]
    if len(numbers) != 1:
        raise InputError(f"{file}: has {len(numbers)} segments {label!r} made {algorithm}, not 1")
    if (data.Columns, data.Rows) != size:
        raise InputError(f"{file}: frames of {(data.Columns, data.Rows)} do not fit slices of {size}")
    place = {uid: z for z, uid in enumerate(uids)}
    segment = np.zeros((*size, len(uids)), np.uint8)
    for frame, group in zip(data.pixel_array, data.PerFrameFunctionalGroupsSequence, strict=True):
        if group.SegmentIdentificationSequence[0].ReferencedSegmentNumber != numbers[0]:
            continue
        uid = str(group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID)
        if uid not in place:
            raise InputError(f"{file}: a frame refers to {uid}, which is no slice of the series")
        segment[..., place[uid]] = frame.T
    return segment


def _read(file: Path) -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise InputError(f"{file}: reading DICOM needs pydicom: pip install 'dinofast[demo]'") from error
    try:
        return pydicom.dcmread(file)
    except (pydicom.errors.InvalidDicomError, EOFError, OSError) as error:
        raise InputError(f"{file}: not a DICOM file, or truncated ({error}); fetch it again") from error
