"""NIfTI volumes as stacks of slices, and anomaly maps back into volumes of the same geometry.

A stack is (S, H, W). Slices run in the direction of the RAS axes: index 0 is the most inferior, posterior or
left one. Each is turned as a radiologist sees it: axial slices with the front at the top, coronal and
sagittal ones with the head at the top; the patient's right (sagittal: front) on the left. An oblique volume
is sliced along its own voxel axes, each named for the patient axis that it is closest to. Nothing is
interpolated, so pixels are as anisotropic as the voxels are.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dinofast.data.sample import Mask, Sample, VolumeSlice
from dinofast.errors import InputError
from dinofast.files import replacing
from dinofast.imaging import RGB

SUFFIXES = (".nii", ".nii.gz")
"""Endings of the files that hold a volume."""

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Name of a slicing direction -> the RAS axis that it runs along."""

_STACKS = (("R", "I", "P"), ("A", "I", "L"), ("S", "P", "L"))
"""For each RAS axis, where slices, rows and columns of its stack point."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A NIfTI volume as a stack of slices; made by `volume`. The pixels of the two last used are kept.

    Attributes:
        path: the file.
        shape: of the array in the file, trailing axes of length 1 included.
        affine: voxel index to millimeters in RAS, (4, 4).
        axis: RAS axis of slicing: 0 sagittal, 1 coronal, 2 axial.
        window: intensities shown as 0 and 255, or None for `percentiles`.
        percentiles: of all voxels, shown as 0 and 255.
        nonfinite: "error" or "zero".
        mask_path: file of the ground truth, or None.
    """

    path: Path
    shape: tuple[int, ...]
    affine: npt.NDArray[np.float64] = field(repr=False)
    axis: int
    window: tuple[float, float] | None
    percentiles: tuple[float, float]
    nonfinite: str
    mask_path: Path | None

    @property
    def stack_shape(self) -> tuple[int, int, int]:
        """Number of slices and size of each: (S, H, W)."""
        s, h, w = _to_stack(np.broadcast_to(np.False_, self.shape[:3]), self).shape
        return s, h, w

    def __len__(self) -> int:
        return self.stack_shape[0]

    def pixels(self, index: int) -> RGB:
        """Read one slice, windowed to 0..255: uint8 (H, W, 3).

        Raises:
            InputError: the file is truncated, holds NaN or infinity (with nonfinite="error"), or has no
                contrast.
        """
        return np.repeat(_pixels(self)[index][..., None], 3, axis=-1)

    def mask(self, index: int) -> Mask:
        """Read the ground truth of one slice: bool (H, W).

        Raises:
            InputError: there is no mask, or it cannot be read.
        """
        if self.mask_path is None:
            raise InputError(f"{self.path}: has no ground truth; give mask= when opening the volume")
        truth: Mask = mask_stack(self, self.mask_path)[index].copy()
        return truth

    def samples(self, indices: Iterable[int] | None = None) -> list[Sample]:
        """List slices as samples; with a mask, which is then read, each has its label.

        Args:
            indices: slices wanted, 0..S − 1; None for all.

        Raises:
            InputError: an index outside the volume, or a mask that cannot be read.
        """
        truth = None if self.mask_path is None else mask_stack(self, self.mask_path)
        return [
            Sample(
                f"{self.path}[{'xyz'[self.axis]}={i}]",
                partial(self.pixels, i),
                None if truth is None else partial(self.mask, i),
                None if truth is None else int(truth[i].any()),
                self.path,
                VolumeSlice(self, i),
            )
            for i in self._indices(indices)
        ]

    def _indices(self, indices: Iterable[int] | None) -> list[int]:
        count = len(self)
        chosen = list(range(count)) if indices is None else [int(i) for i in indices]
        if len(set(chosen)) < len(chosen) or any(not 0 <= i < count for i in chosen):
            raise InputError(f"{self.path}: slices {chosen}; each is one of 0..{count - 1} and comes once")
        return chosen

    def write(self, maps: Any, path: str | os.PathLike[str], indices: Iterable[int] | None = None) -> None:
        """Write anomaly maps as a NIfTI volume that lies voxel by voxel on the input file.

        Shape, affine, orientation and voxel size are those of the input; voxels are float32.

        Args:
            maps: (S, H, W), an array or a sequence of (H, W) arrays or CPU tensors, one for each of
                `indices`, in that order, as the slices were read. NaN stays NaN.
            path: file to write, .nii or .nii.gz; replaced atomically.
            indices: slices that the maps belong to; None for all. Other slices become 0.

        Raises:
            InputError: maps of another number or size, an index outside the volume, another suffix, or a
                folder that cannot be written to.
        """
        chosen = self._indices(indices)
        values = np.stack([np.asarray(m, np.float32) for m in maps]) if len(maps) else np.empty((0, 0, 0))
        wanted = (len(chosen), *self.stack_shape[1:])
        if values.shape != wanted:
            raise InputError(f"{self.path}: maps of shape {values.shape}, and the slices need {wanted}")
        if not os.fspath(path).endswith(SUFFIXES):
            raise InputError(f"{os.fspath(path)}: the name of a map volume ends in {' or '.join(SUFFIXES)}")
        stack = np.zeros(self.stack_shape, np.float32)
        stack[chosen] = values
        with _reading(self.path):
            original = _open(self.path)
        header = original.header.copy()
        header.set_data_dtype(np.float32)
        header["cal_min"] = header["cal_max"] = 0  # the display range of the input means nothing here
        data = np.ascontiguousarray(_from_stack(stack, self)).reshape(self.shape)
        with replacing(path) as temporary:
            _nibabel().save(type(original)(data, original.affine, header), temporary)


def volume(
    path: str | os.PathLike[str],
    *,
    axis: str | int = "axial",
    window: tuple[float, float] | None = None,
    percentiles: tuple[float, float] = (0.5, 99.5),
    nonfinite: str = "error",
    mask: str | os.PathLike[str] | None = None,
) -> Volume:
    """Open a NIfTI volume; only its header is read, and that of its mask.

    Args:
        path: .nii or .nii.gz, 3-D (axes of length 1 may follow), integer or floating, in any orientation.
        axis: "axial", "coronal", "sagittal", or the RAS axis to slice along: 2, 1, 0.
        window: intensities (low, high) shown as 0 and 255, such as (-1350, 150) for lungs in CT; those
            outside are clipped. None for `percentiles`.
        percentiles: of all voxels of the volume, shown as 0 and 255.
        nonfinite: "error" refuses NaN and infinite voxels, "zero" replaces them by 0 before all else.
        mask: NIfTI of the same shape and affine; voxels other than 0 are anomalous.

    Returns:
        The volume.

    Raises:
        InputError: an argument outside these, a file that is missing, truncated, not NIfTI, not 3-D, not of
            real numbers or without a usable affine, a mask that does not lie on the volume, or nibabel
            is missing.
    """
    number = AXES.get(axis, -1) if isinstance(axis, str) else int(axis)
    if number not in AXES.values():
        raise InputError(f"axis {axis!r}: one of {', '.join(map(repr, AXES))} or 2, 1, 0")
    if nonfinite not in ("error", "zero"):
        raise InputError(f"nonfinite {nonfinite!r}: one of 'error', 'zero'")
    if window is not None and not (np.isfinite(window).all() and window[0] < window[1]):
        raise InputError(f"window {window}: needs two finite intensities, the lower first")
    if not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise InputError(f"percentiles {percentiles}: need 0 <= low < high <= 100")
    file, mask_file = Path(path), None if mask is None else Path(mask)
    with _reading(file):
        shape, affine = _geometry(_open(file), file)
    if mask_file is not None:
        with _reading(mask_file):
            mask_shape, mask_affine = _geometry(_open(mask_file), mask_file)
        if mask_shape[:3] != shape[:3]:
            raise InputError(f"{mask_file}: shape {mask_shape} is not that of {file}, {shape}; resample it")
        if not np.allclose(mask_affine, affine, rtol=1e-4, atol=1e-3):
            raise InputError(f"{mask_file}: its affine is not that of {file}; resample it onto the volume")
    return Volume(file, shape, affine, number, window, percentiles, nonfinite, mask_file)


def _nibabel() -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise InputError("NIfTI volumes need nibabel: pip install 'dinofast[medical]'") from error
    return nibabel


def _open(path: Path) -> Any:
    nibabel = _nibabel()
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the path of a NIfTI volume")
    image = nibabel.load(path, mmap=False)
    if not isinstance(image, nibabel.Nifti1Image):
        raise InputError(f"{path}: is {type(image).__name__}, not NIfTI; convert it to .nii.gz")
    return image


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a torn or foreign file makes nibabel raise into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError

        torn = (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError)
        if not isinstance(error, torn):
            raise
        raise InputError(f"{path}: truncated or not NIfTI ({error}); fetch or export it again") from error


def _geometry(image: Any, path: Path) -> tuple[tuple[int, ...], npt.NDArray[np.float64]]:
    shape, affine = tuple(int(n) for n in image.shape), np.asarray(image.affine, np.float64)
    if len(shape) < 3 or any(n != 1 for n in shape[3:]):
        raise InputError(
            f"{path}: is {len(shape)}-D, shape {shape}; volumes are 3-D: split it, or choose one time point "
            "or channel"
        )
    if 0 in shape:
        raise InputError(f"{path}: shape {shape} holds no voxels")
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(f"{path}: voxels are {image.get_data_dtype()}; integer or floating ones are read")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise InputError(f"{path}: its affine maps no voxel to a place in space; repair the header")
    return shape, affine


def _to_stack(array: npt.NDArray[Any], like: Volume, *, back: bool = False) -> npt.NDArray[Any]:
    orientations = _nibabel().orientations
    stored = orientations.io_orientation(like.affine)
    shown = orientations.axcodes2ornt(_STACKS[like.axis])
    start, end = (shown, stored) if back else (stored, shown)
    turned: npt.NDArray[Any] = orientations.apply_orientation(array, orientations.ornt_transform(start, end))
    return turned


def _from_stack(stack: npt.NDArray[Any], like: Volume) -> npt.NDArray[Any]:
    return _to_stack(stack, like, back=True)


def _voxels(path: Path, nonfinite: str, like: Volume) -> npt.NDArray[np.float32]:
    with _reading(path), np.errstate(over="ignore"):
        image = _open(path)
        if tuple(image.shape)[:3] != like.shape[:3]:
            raise InputError(f"{path}: changed its shape since it was opened; open it again")
        values = np.array(image.get_fdata(dtype=np.float32, caching="unchanged")).reshape(like.shape[:3])
    finite = np.isfinite(values)
    if not finite.all():
        if nonfinite == "error":
            raise InputError(
                f"{path}: {values.size - int(finite.sum())} of {values.size} voxels are NaN or infinite; "
                'repair them, or take them as 0 with nonfinite="zero"'
            )
        values[~finite] = 0
    return values


@lru_cache(maxsize=2)
def _pixels(like: Volume) -> npt.NDArray[np.uint8]:
    values = _voxels(like.path, like.nonfinite, like)
    low, high = float(values.min()), float(values.max())
    if low == high:
        raise InputError(f"{like.path}: every voxel is {low:g}; the volume is blank or corrupt")
    bottom, top = like.window or (float(v) for v in np.percentile(values, like.percentiles))
    if bottom == top or top <= low or bottom >= high:
        raise InputError(
            f"{like.path}: no contrast between {bottom:g} and {top:g}, voxels reach from {low:g} to "
            f"{high:g}; choose another window"
        )
    values -= bottom
    values *= 255 / (top - bottom)
    np.clip(values, 0, 255, out=values)
    return np.ascontiguousarray(_to_stack(np.rint(values, out=values).astype(np.uint8), like))


@lru_cache(maxsize=4)
def mask_stack(like: Volume, path: Path) -> Mask:
    """Read a mask that lies on the volume `like` as its stack: bool (S, H, W), True where voxels are not 0.

    Raises:
        InputError: the file is truncated or holds NaN or infinity.
    """
    return np.ascontiguousarray(_to_stack(_voxels(path, "error", like) != 0, like))


def write_volume(array: npt.NDArray[np.generic], affine: npt.NDArray[np.float64], path: Path) -> None:
    """Write (X, Y, Z) in its own dtype as NIfTI in millimeters; the same input gives the same bytes.

    Raises:
        InputError: the folder cannot be written to, or nibabel is missing.
    """
    nibabel = _nibabel()
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    with replacing(path) as temporary:
        nibabel.save(image, temporary)
