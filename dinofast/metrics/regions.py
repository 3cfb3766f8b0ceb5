"""Per-region overlap (PRO): every anomalous region counts the same, however small; streamed with bounds.

With t falling, PRO(t) is the mean, over all regions of all images, of the share of the region's pixels that
score at least t, and FPR(t) the share of all normal pixels that do. The area under PRO over FPR, from 0 to a
limit, divided by the limit, is the metric; points are joined by straight lines. A region is an 8-connected
component of the ground truth.

Scores are binned as in `streamed`; what is unknown is only the order inside a bin, and the best and the worst
order are known: all of the bin's region pixels first, or last.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dinofast.errors import InputError
from dinofast.metrics.ranking import check, to_numpy
from dinofast.metrics.streamed import Bounded, bin_index


class RegionOverlap:
    """Histograms from which the area under the per-region overlap curve is bounded.

    Memory is 16 bytes a bin whatever the number of pixels: 16 MiB by default.

    Args:
        limit: largest false-positive rate of the integral, in (0, 1].
        bins: a power of two from 2^9 to 2^26, see `StreamedRanking`.

    Raises:
        InputError: a limit or number of bins that cannot be, or scipy, which labels the regions, is missing.

    References:
        Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021: limit 0.3.

    >>> regions = RegionOverlap()
    >>> regions.update([[0.9, 0.8], [0.1, 0.7]], [[1, 1], [0, 0]])
    >>> round(regions.area().value, 6)
    1.0
    """

    def __init__(self, limit: float = 0.3, bins: int = 2**20) -> None:
        if not 0 < limit <= 1:
            raise InputError(f"limit is {limit}; give a false-positive rate above 0 and at most 1")
        if bins & (bins - 1) or not 2**9 <= bins <= 2**26:
            raise InputError(f"bins is {bins}; give a power of two from 512 to {2**26}")
        require_scipy()
        self.limit, self.bins, self.n_regions = limit, bins, 0
        self._normal: NDArray[np.int64] = np.zeros(bins, np.int64)
        self._overlap: NDArray[np.float64] = np.zeros(bins)

    def update(self, map: ArrayLike | Tensor, truth: ArrayLike | Tensor) -> None:
        """Add one image's map.

        Args:
            map: (H, W), real numbers; infinities rank as numbers do.
            truth: (H, W), bool or 0 and 1, 1 is anomalous; an image without regions adds normal pixels.

        Raises:
            InputError: not two axes, shapes differ, NaN scores, or labels other than 0 and 1; nothing was
                added then.
        """
        from scipy.ndimage import label

        shape = to_numpy(truth).shape
        if len(shape) != 2 or to_numpy(map).shape != shape:
            raise InputError(
                f"map {to_numpy(map).shape} and truth {shape}; give one image (H, W) with its mask"
            )
        values, positive = check(map, truth, both_classes=False)
        key = bin_index(values, self.bins)
        self._normal += np.bincount(key[~positive], minlength=self.bins)
        if not positive.any():
            return
        regions, count = label(positive.reshape(shape), structure=np.ones((3, 3), np.int8))
        inside = regions.reshape(-1)[positive]
        share = 1 / np.bincount(inside)[1:]
        at, where = np.unique(key[positive], return_inverse=True)
        self._overlap[at] += np.bincount(where, weights=share[inside - 1])
        self.n_regions += int(count)

    def area(self) -> Bounded:
        """Bound the area under the curve up to `limit`, divided by `limit`.

        Returns:
            Value with all scores of a bin tied; all three in [0, 1], 1 is perfect.

        Raises:
            InputError: there are no regions or no normal pixels.
        """
        total = int(self._normal.sum())
        if not self.n_regions or not total:
            raise InputError(
                f"{self.n_regions} regions and {total} normal pixels; per-region overlap needs both"
            )
        used = np.flatnonzero((self._normal > 0) | (self._overlap > 0))[::-1]
        fpr = np.concatenate([[0.0], np.cumsum(self._normal[used]) / total])
        pro = np.concatenate([[0.0], np.cumsum(self._overlap[used]) / self.n_regions])
        before, after = pro[:-1], pro[1:]
        step = np.diff(fpr)
        width = np.clip(self.limit - fpr[:-1], 0, step)
        reached = np.divide(width, step, out=np.zeros_like(step), where=step > 0)
        straight = before + reached * (after - before) / 2
        value, low, high = (math.fsum(width * y) / self.limit for y in (straight, before, after))
        return Bounded(min(value, 1.0), max(min(low, value) - 1e-12, 0.0), min(max(high, value) + 1e-12, 1.0))


def require_scipy() -> None:
    """Raise InputError where scipy is missing."""
    try:
        import scipy.ndimage  # noqa: F401
    except ImportError as error:
        raise InputError("per-region overlap needs scipy: pip install 'dinofast[regions]'") from error
