"""The three things that pass between rooms: features, a scored batch, and one image's prediction.

Letters, here and everywhere: B images, H and W pixels, h and w patch grid, N patches (B·h·w), D channels,
K prototypes or components, Q queries, M bank rows, k neighbors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Patch features of a batch of images that share one size.

    Models also take arrays of other libraries in place of the tensors, such as CuPy's and NumPy's, without a
    copy, and give results as the kind of `tensor`, see `dinofast.interop`.

    Attributes:
        tensor: patch features (B, h, w, D), floating point, not normalized.
        cls: class token (B, D), or None where the backbone has none.
        image_size: (H, W) in pixels at which a map of these images is wanted.
        intensity: mean gray of the pixels under each patch (B, h, w) in [0, 1], for foreground rules; None
            where nobody asked for it.
        masks: (B, H, W) bool, True where a pixel is abnormal; None where it is not known.
        class_name: what the images show, such as "brain", for models that read texts; None leaves it to them.
    """

    tensor: Tensor | Any
    cls: Tensor | Any | None
    image_size: tuple[int, int]
    intensity: Tensor | Any | None = None
    masks: Tensor | Any | None = None
    class_name: str | None = None

    def __len__(self) -> int:
        return int(self.tensor.shape[0])

    def part(self, start: int, stop: int) -> Features:
        """Give the images from `start` to before `stop`, not copied."""
        part = slice(start, stop)
        return replace(
            self,
            tensor=self.tensor[part],
            cls=None if self.cls is None else self.cls[part],
            intensity=None if self.intensity is None else self.intensity[part],
            masks=None if self.masks is None else self.masks[part],
        )


@dataclass(frozen=True)
class Scores:
    """What a model says of a batch. Higher is more abnormal, everywhere.

    Attributes:
        score: one number an image (B,), float32.
        map: one number a pixel (B, H, W), float32, at `Features.image_size`.
    """

    score: Tensor
    map: Tensor


@dataclass(frozen=True)
class Prediction:
    """What a detector says of one image.

    Attributes:
        score: image score; higher is more abnormal.
        map: anomaly map (H, W), float32, on the CPU, at the image's own size.
        mask: (H, W) bool, True where the map exceeds the calibrated pixel threshold; None when the
            detector has no pixel threshold.
        is_anomalous: whether the score exceeds the calibrated image threshold; None when there is none.
        source: where the image came from: a path, "scan.nii.gz[z=12]" or "array[3]".
    """

    score: float
    map: Tensor
    mask: Tensor | None
    is_anomalous: bool | None
    source: str
