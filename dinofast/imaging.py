"""What an image is: every accepted form becomes uint8 RGB (H, W, 3), by rules written here and nowhere else.

* 16-bit values keep their high byte (value // 256 over the full range 0..65535), which is also how Pillow
  reads 16-bit color PNG. A scan that uses fewer bits must be windowed first.
* Floating values must lie in [0, 1] and become round(255 * value).
* One channel is repeated three times. Alpha is dropped. Palette, CMYK, YCbCr and 1-bit become RGB as Pillow
  does it.
* The EXIF orientation is applied.
* numpy arrays are channels last, (H, W, C); torch tensors are channels first, (C, H, W).
"""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dinofast.errors import InputError

ImageLike = str | os.PathLike[str] | Image.Image | npt.NDArray[Any] | torch.Tensor
"""A path, a Pillow image, an array (H, W), (H, W, 1 | 3 | 4) or a tensor (H, W), (1 | 3 | 4, H, W)."""

RGB = npt.NDArray[np.uint8]
"""uint8 (H, W, 3), 0..255."""

HASH_BYTES = 16
"""Length of a `digest`."""

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


def decode(path: str | os.PathLike[str]) -> RGB:
    """Read an image file that Pillow knows (PNG, JPEG, TIFF, BMP, WebP, ...), 8 or 16 bits a channel.

    Of an animation the first frame is taken.

    Args:
        path: the file.

    Returns:
        uint8 (H, W, 3), upright by its EXIF orientation.

    Raises:
        InputError: no such file, a folder, not readable, not an image, truncated, of several TIFF pages,
            larger than Pillow's decompression limit, or a 32-bit file with values outside its range.
    """
    with _opened(path) as image:
        image.load()
        return _from_pil(image, os.fspath(path))


def decode_mask(path: str | os.PathLike[str]) -> npt.NDArray[np.bool_]:
    """Read a mask file: a pixel belongs to the mask when any of its values, as stored, is not 0.

    No value is too small, 1 of 65535 counts as 255 does. Of a palette image the color counts, not its index:
    what is black belongs to no mask. Alpha does not count. Pillow itself reads 16-bit color with its high
    byte only.

    Args:
        path: the file, of any form that `decode` reads.

    Returns:
        bool (H, W), upright by its EXIF orientation.

    Raises:
        InputError: as `decode`, except that no value is out of range.
    """
    with _opened(path) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        values = np.asarray(upright if upright.mode in (*_WIDE, "1", "L") else upright.convert("RGB"))
        found: npt.NDArray[np.bool_] = (values != 0).reshape(*values.shape[:2], -1).any(axis=-1)
        return found


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Give (H, W) of what `decode` returns, from the header wherever that settles it.

    Raises:
        InputError: as `decode`, as far as the header shows it.
    """
    with _opened(path) as image:
        if image.width != image.height and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
            image = ImageOps.exif_transpose(image)
        return image.height, image.width


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open an image file; whatever Pillow raises until it is closed becomes an InputError that names it."""
    name = os.fspath(path)
    if not Path(path).is_file():
        reason = "is a folder, not an image file" if Path(path).is_dir() else "no such file"
        raise InputError(f"{name}: {reason}; give the path of an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
                    pages = getattr(image, "n_frames", 1)
                    raise InputError(f"{name}: a TIFF of {pages} pages; save each page as its own file")
                yield image
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(
            f"{name}: too large, more than {limit} pixels, Pillow's limit; cut it into tiles"
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not an image that Pillow can read; remove or convert it") from error
    except PermissionError as error:
        raise InputError(f"{name}: may not be read; check its permissions") from error
    except _BROKEN as error:
        raise InputError(f"{name}: truncated or corrupt image ({error}); fetch or export it again") from error


def as_rgb(image: ImageLike, name: str = "image") -> RGB:
    """Turn any accepted image into uint8 RGB.

    Args:
        image: a path; a Pillow image; a numpy array (H, W) or (H, W, C); a torch tensor (H, W) or (C, H, W)
            on any device; C is 1, 3 or 4 (alpha, dropped); uint8, uint16, or floating in [0, 1].
        name: what error messages call it, when it has no path.

    Returns:
        uint8 (H, W, 3), contiguous; it may share memory with `image`.

    Raises:
        InputError: wrong type, shape or dtype, no pixels, NaN or infinity, floating values outside [0, 1], or
            whatever `decode` refuses.

    >>> as_rgb(np.full((2, 4), 0.5, np.float32))[0, 0].tolist()
    [128, 128, 128]
    >>> as_rgb(torch.zeros(3, 2, 4)).shape
    (2, 4, 3)
    """
    if isinstance(image, (str, os.PathLike)):
        return decode(image)
    if isinstance(image, Image.Image):
        try:
            return _from_pil(image, name)
        except InputError:
            raise
        except _BROKEN as error:
            raise InputError(f"{name}: cannot be decoded ({error}); fetch or export it again") from error
    if isinstance(image, torch.Tensor):
        tensor = image.detach().cpu()
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        if tensor.ndim == 3:
            _check_channels(tensor.shape[0], tuple(tensor.shape), "a tensor is (C, H, W)", name)
            tensor = tensor.movedim(0, -1)
        return _from_array(tensor.numpy(), name)
    if isinstance(image, np.ndarray):
        if image.ndim == 3:
            _check_channels(image.shape[-1], image.shape, "an array is (H, W, C)", name)
        return _from_array(image, name)
    raise InputError(
        f"{name}: cannot use {type(image).__name__} as an image; give a path, Pillow image, array or tensor"
    )


def _check_channels(channels: int, shape: tuple[int, ...], rule: str, name: str) -> None:
    if channels not in (1, 3, 4):
        raise InputError(
            f"{name}: shape {shape} has {channels} channels; {rule} with C = 1, 3 or 4: move or choose them"
        )


def _from_pil(image: Image.Image, name: str) -> RGB:
    image = ImageOps.exif_transpose(image)
    if image.mode in _WIDE:
        values = np.asarray(image)
        if image.mode == "I":
            low, high = int(values.min()), int(values.max())
            if low < 0 or high > 65535:
                raise InputError(
                    f"{name}: 32-bit integers from {low} to {high}; 16 bits are read, 0..65535: rescale it"
                )
        return _from_array(values if image.mode == "F" else values.astype(np.uint16), name)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def _from_array(array: npt.NDArray[Any], name: str) -> RGB:
    if array.ndim not in (2, 3):
        raise InputError(f"{name}: shape {array.shape}; give one image of 2 or 3 axes, not a batch or volume")
    if array.size == 0:
        raise InputError(f"{name}: shape {array.shape} holds no pixels; give an image of at least one pixel")
    array = array[..., :3] if array.ndim == 3 else array[..., None]
    if array.dtype == np.uint16:
        values = (array >> 8).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            raise InputError(f"{name}: holds NaN or infinity; replace these pixels first")
        low, high = float(array.min()), float(array.max())
        if low < -1e-6 or high > 1 + 1e-6:
            raise InputError(
                f"{name}: floating values from {low:g} to {high:g}; scale them to [0, 1] or use uint8"
            )
        values = np.rint(np.clip(array.astype(np.float64, copy=False), 0, 1) * 255).astype(np.uint8)
    elif array.dtype == np.uint8:
        values = array
    else:
        raise InputError(
            f"{name}: dtype {array.dtype}; give uint8, uint16 or floating values in [0, 1]: convert it first"
        )
    return np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3)))


def rotations(image: RGB, steps: int = 8) -> list[RGB]:
    """Turn an image about its center by 0°, 360/steps°, ..., on the same canvas, bilinearly.

    What lies outside is reflected without repeating the edge pixel.

    Args:
        image: uint8 (H, W, 3), H and W at least 2.
        steps: how many copies, the first unturned.

    Returns:
        `steps` images of the same shape, turned counterclockwise.

    References:
        Damm et al., AnomalyDINO, WACV 2025, arXiv 2405.14529.

    >>> turned = rotations(np.arange(12, dtype=np.uint8).reshape(2, 2, 3), 4)
    >>> bool((turned[1] == np.rot90(turned[0])).all())
    True
    """
    height, width = image.shape[:2]
    pixels = torch.from_numpy(image.astype(np.float64)).movedim(-1, 0)[None]
    y, x = np.meshgrid(
        np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2, indexing="ij"
    )
    found = []
    for step in range(steps):
        angle = 2 * np.pi * step / steps
        source_x, source_y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
        scaled = np.stack([source_x * 2 / (width - 1), source_y * 2 / (height - 1)], axis=-1)
        turned = torch.nn.functional.grid_sample(
            pixels,
            torch.from_numpy(scaled)[None],
            mode="bilinear",
            padding_mode="reflection",
            align_corners=True,
        )
        found.append(turned[0].round().clamp(0, 255).to(torch.uint8).movedim(0, -1).numpy())
    return found


def digest(image: RGB) -> bytes:
    """Hash decoded pixels, so that a renamed or losslessly re-encoded copy is still known."""
    found = hashlib.blake2b(str(image.shape).encode(), digest_size=HASH_BYTES)
    found.update(np.ascontiguousarray(image).data)
    return found.digest()


def as_size(size: Any) -> tuple[int, int]:
    """Read (H, W), numbers of Python or NumPy.

    Raises:
        InputError: not two whole numbers, each at least 1.
    """
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(map(_is_whole, size)):
        raise InputError(f"a size is (H, W) of the images as they are read, two whole numbers, got {size!r}")
    if min(size) < 1:
        raise InputError(f"a size is (H, W), each at least 1, got {tuple(size)}")
    return int(size[0]), int(size[1])


def _is_whole(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)
