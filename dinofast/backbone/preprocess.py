"""From an image to the pixels a backbone reads: the one definition, for fitting and for deployment."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dinofast.errors import InputError
from dinofast.imaging import RGB, ImageLike, as_rgb, decode

__all__ = ["MAX_TOKENS", "MEAN", "STD", "ImageLike", "Preprocess", "Size", "decode", "patch_gray"]

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MAX_TOKENS = 16384
"""Most patches of one image; attention over more takes minutes and tens of gigabytes."""

Size = int | tuple[int, int]


@dataclass(frozen=True)
class Preprocess:
    """Decode, resize on uint8 as Pillow does (bicubic, antialiased), crop to whole patches, normalize.

    Attributes:
        size: pixels of the smaller edge; or (H, W), which implies "squash".
        patch_size: height and width are cropped at the bottom and right to multiples of it.
        resize: "edge" keeps the aspect: the smaller edge becomes `size`, the longer
            int(size * longer / smaller); "squash" makes it exactly `size`, (size, size) for one number.

    Raises:
        InputError: on construction, a size below one patch or an unknown `resize`.

    >>> pixels = Preprocess(28, 14)(np.zeros((60, 90), np.uint8))
    >>> pixels.shape, pixels.dtype
    (torch.Size([3, 28, 42]), torch.float32)
    """

    size: Size
    patch_size: int
    resize: Literal["edge", "squash"] = "edge"

    def __post_init__(self) -> None:
        if self.resize not in ("edge", "squash"):
            raise InputError(
                f"resize={self.resize!r}: choose 'edge' (keep the aspect) or 'squash' (exact size)"
            )
        if not isinstance(self.size, int):
            object.__setattr__(self, "size", (int(self.size[0]), int(self.size[1])))
            object.__setattr__(self, "resize", "squash")
        edges = (self.size,) if isinstance(self.size, int) else self.size
        if min(edges) < self.patch_size:
            raise InputError(
                f"size={self.size}: smaller than one patch of {self.patch_size} pixels; choose a larger size"
            )

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (H, W) of an image of (height, width) after resizing, before cropping."""
        if isinstance(self.size, tuple):
            return self.size
        if self.resize == "squash":
            return self.size, self.size
        longer = int(self.size * max(height, width) / min(height, width))
        return (self.size, longer) if height <= width else (longer, self.size)

    def cropped_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (H, W) of the pixels that an image of (height, width) becomes: whole patches.

        Raises:
            InputError: the image is smaller than one patch, or would have more than `MAX_TOKENS` patches.
        """
        patch = self.patch_size
        if min(height, width) < patch:
            raise InputError(
                f"{height}x{width} pixels: smaller than one patch of {patch}x{patch}; give a larger image"
            )
        rows, columns = (edge // patch for edge in self.resized_size(height, width))
        if rows * columns > MAX_TOKENS:
            raise InputError(
                f"{height}x{width} pixels become {rows}x{columns} = {rows * columns} patches, more than "
                f"{MAX_TOKENS}; cut the image into tiles, choose a smaller size, or resize='squash'"
            )
        return rows * patch, columns * patch

    def resized(self, image: ImageLike, name: str = "image") -> RGB:
        """Return the image as uint8 (H, W, 3), resized and cropped, not yet normalized.

        Raises:
            InputError: see `dinofast.imaging.as_rgb` and `cropped_size`; it names the file, or `name`.
        """
        rgb = as_rgb(image, name)
        height, width = rgb.shape[:2]
        try:
            cropped = self.cropped_size(height, width)
        except InputError as error:
            raise InputError(f"{_named(image, name)}: {error}") from error
        rows, columns = self.resized_size(height, width)
        if (rows, columns) != (height, width):
            rgb = np.asarray(Image.fromarray(rgb).resize((columns, rows), Image.Resampling.BICUBIC))
        return np.ascontiguousarray(rgb[: cropped[0], : cropped[1]])

    def __call__(self, image: ImageLike, name: str = "image") -> Tensor:
        """Return normalized pixels (3, H, W), float32, on the CPU.

        Args:
            image: path, Pillow image, array or tensor, by the rules of `dinofast.imaging`.
            name: what error messages call an image that has no path.

        Raises:
            InputError: see `resized`.
        """
        return normalize(self.resized(image, name))

    def mask(self, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return a mask (H, W) resized and cropped as its image is.

        Args:
            mask: bool (H, W), of the image's size.

        Returns:
            bool, of the pixels' size: True where the mask covers at least half of a pixel; where it covers
            half of none, True where it touches one, so that a small defect stays.

        Raises:
            InputError: see `cropped_size`.
        """
        height, width = mask.shape
        cropped = self.cropped_size(height, width)
        rows, columns = self.resized_size(height, width)
        share = Image.fromarray(mask.astype(np.float32))
        if (rows, columns) != (height, width):
            share = share.resize((columns, rows), Image.Resampling.BILINEAR)
        part = np.asarray(share)[: cropped[0], : cropped[1]]
        found: npt.NDArray[np.bool_] = part >= 0.5
        return found if found.any() else part > 0

    @property
    def config(self) -> dict[str, Any]:
        """Everything here that decides features, ready for JSON."""
        return {
            "size": self.size if isinstance(self.size, int) else list(self.size),
            "resize": self.resize,
            "patch_size": self.patch_size,
            "interpolation": "bicubic, antialiased, uint8",
            "mean": list(MEAN),
            "std": list(STD),
        }


def normalize(rgb: npt.NDArray[np.uint8]) -> Tensor:
    """Turn uint8 (H, W, 3) into float32 (3, H, W): (value / 255 - mean) / std, ImageNet's mean and std."""
    pixels = torch.from_numpy(rgb.copy() if not rgb.flags.writeable else rgb).movedim(-1, 0).float().div_(255)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return pixels.sub_(mean).div_(std).contiguous()


def patch_gray(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average the gray of the pixels under each patch; gray is the mean of red, green and blue.

    Args:
        pixels: what `normalize` gave, (B, 3, H, W).
        grid: patches (h, w). Where H or W is no multiple of it, patches share the rows or columns of pixels
            that they meet in.

    Returns:
        (B, h, w), float32, in [0, 1]: 0 is black.

    >>> patch_gray(normalize(np.full((4, 6, 3), 255, np.uint8))[None], (2, 3)).shape
    torch.Size([1, 2, 3])
    """
    mean, std = _mean_and_std(pixels.device)
    shares = adaptive_avg_pool2d(pixels.float(), grid)
    return (shares * std[:, None, None] + mean[:, None, None]).mean(dim=1).clamp(0, 1)


@cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Keep both on the device, where a recorded graph reads them: copied once, never freed."""
    return torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)


def _named(image: ImageLike, name: str) -> str:
    return name if isinstance(image, (np.ndarray, Tensor, Image.Image)) else str(image)
