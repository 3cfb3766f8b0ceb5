"""One image to fit or score: where it came from, how to read it, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dinofast.imaging import RGB

if TYPE_CHECKING:
    from dinofast.data.nifti import Volume

Mask = npt.NDArray[np.bool_]
"""bool (H, W), True where the image is anomalous."""


@dataclass(frozen=True)
class VolumeSlice:
    """The place of a slice in its volume; `volume.write` puts its anomaly map back there.

    Attributes:
        volume: the volume that the slice was cut from.
        index: its number along `volume.axis`, counted in the RAS direction from 0.
    """

    volume: Volume
    index: int


@dataclass(frozen=True)
class Sample:
    """One image, read only when asked: a list of a million of them is small.

    Attributes:
        source: its name: a path, "scan.nii.gz[z=12]" or "array[3]".
        reader: gives the pixels, uint8 (H, W, 3).
        mask_reader: gives the ground truth, bool (H, W); None when there is none.
        label: 0 normal, 1 anomalous, None unknown.
        path: the file it is read from; None for images that live in memory.
        volume: its place in a volume; None for a plain image.
    """

    source: str
    reader: Callable[[], RGB] = field(repr=False, compare=False)
    mask_reader: Callable[[], Mask] | None = field(default=None, repr=False, compare=False)
    label: int | None = None
    path: Path | None = None
    volume: VolumeSlice | None = None

    def load(self) -> RGB:
        """Read the pixels, anew at each call.

        Returns:
            uint8 (H, W, 3), 0..255.

        Raises:
            InputError: the file or array cannot be used; the message names it.
        """
        return self.reader()

    def mask(self) -> Mask | None:
        """Read the ground truth, anew at each call.

        Returns:
            bool (H, W), True on anomalous pixels, all False for an image known to be normal; None when
            nothing is known pixel by pixel.

        Raises:
            InputError: the mask cannot be read, or its size is not that of the image.
        """
        return None if self.mask_reader is None else self.mask_reader()
