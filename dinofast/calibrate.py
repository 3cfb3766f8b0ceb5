"""Thresholds from normal images only, at a wanted rate of false alarms.

A threshold is data: what was asked, what came out on the normal images it was drawn from, and how sure that
is. Something is called anomalous when its score is strictly above the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dinofast.errors import ArtifactError, InputError
from dinofast.metrics import StreamedRanking
from dinofast.metrics.ranking import to_numpy
from dinofast.metrics.streamed import bin_index
from dinofast.types import Prediction

LEVELS = ("pixel", "image")
_Z95 = 1.959963984540054
_RESAMPLES = 2000


@dataclass(frozen=True)
class Threshold:
    """A threshold with the evidence it rests on; `to_dict` gives what JSON can hold.

    Attributes:
        level: "pixel" or "image".
        fpr: false-positive rate that was asked for, in (0, 1).
        value: scores strictly above it are anomalous; finite.
        realized_rate: share of the normal pixels or images of the calibration above `value`, in [0, 1].
        interval: 95 % confidence interval (low, high) of that rate; None where it is unknown, that is for
            the pixels of a single image.
        n_images: number of normal images.
        n_pixels: number of their pixels; None at level "image".
        method: "held-out" (images that `fit` never saw) or "cross-fit k" (each fold scored by a model of
            the others).
    """

    level: str
    fpr: float
    value: float
    realized_rate: float
    interval: tuple[float, float] | None
    n_images: int
    n_pixels: int | None
    method: str

    def __str__(self) -> str:
        """Say it in one line for people."""
        sure = "unknown" if self.interval is None else "{:.2%} to {:.2%}".format(*self.interval)
        images = "1 normal image" if self.n_images == 1 else f"{self.n_images} normal images"
        return (
            f"{self.level} threshold {self.value:.6g}: {self.fpr:.4g} asked, {self.realized_rate:.2%} "
            f"realized (95 % interval {sure}) on {images}, {self.method}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as a dict of JSON types; `from_dict` turns it back."""
        return {**asdict(self), "interval": None if self.interval is None else list(self.interval)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Threshold:
        """Rebuild a threshold from `to_dict`.

        Args:
            data: the dict, perhaps read from JSON.

        Returns:
            An equal threshold.

        Raises:
            ArtifactError: fields are missing or unknown, or the level or the value cannot be.
        """
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            raise ArtifactError(f"threshold has fields {sorted(data)}, not {sorted(names)}; calibrate again")
        value, interval = data["value"], data["interval"]
        if (
            data["level"] not in ("pixel", "image")
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            raise ArtifactError(
                f"threshold of level {data['level']!r} and value {value!r}; expected pixel or image and "
                "a finite number; calibrate again"
            )
        return cls(**{**data, "interval": None if interval is None else (interval[0], interval[1])})


def marked(score: float, map: Tensor, source: str, thresholds: Mapping[str, Threshold]) -> Prediction:
    """Hold an image's score and map (H, W) to the thresholds of their levels, where there are any."""
    pixel, image = (thresholds.get(level) for level in LEVELS)
    return Prediction(
        score=score,
        map=map,
        mask=None if pixel is None else map > pixel.value,
        is_anomalous=None if image is None else score > image.value,
        source=source,
    )


def image_threshold(scores: ArrayLike | Tensor, fpr: float, *, method: str = "held-out") -> Threshold:
    """Choose the image threshold by split conformal prediction.

    The ceil((n + 1)(1 - fpr))-th smallest of n scores. If the next normal image is exchangeable with these,
    it lies above with probability at most fpr, on average over calibration sets; for one given set the
    realized rate and its Wilson interval say how far that average can be from the truth.

    Args:
        scores: image scores (n,) of normal images; infinities are allowed while the threshold is finite.
        fpr: wanted false-positive rate in (0, 1), taken as the decimal it prints as.
        method: kept in the result.

    Returns:
        Threshold of level "image".

    Raises:
        InputError: fpr outside (0, 1), NaN scores, too few images for this fpr (19 at 0.05), or a threshold
            that would be infinite.

    References:
        Vovk, Gammerman, Shafer. Algorithmic Learning in a Random World. Springer, 2005.
        Wilson. Probable inference, the law of succession, and statistical inference. JASA, 1927.

    >>> threshold = image_threshold(range(1, 40), 0.05)
    >>> threshold.value, round(threshold.realized_rate, 4)
    (38.0, 0.0256)
    """
    rate = _fraction(fpr)
    ordered = np.sort(_numbers(scores, "scores").astype(np.float64))
    needed = math.ceil(1 / rate) - 1
    if ordered.size < needed:
        raise InputError(
            f"{ordered.size} normal images cannot give an image threshold at fpr {fpr}: it takes "
            f"{needed}; give more normal images, ask for a higher fpr, or calibrate at level='pixel'"
        )
    value = _finite(ordered[math.ceil((ordered.size + 1) * (1 - rate)) - 1], fpr)
    above = int(np.count_nonzero(ordered > value))
    n = ordered.size
    return Threshold("image", fpr, value, above / n, wilson(above, n), n, None, method)


def wilson(count: int, n: int) -> tuple[float, float]:
    """Compute the 95 % Wilson interval of a rate observed as `count` of `n` > 0 independent cases."""
    middle, spread = count + _Z95**2 / 2, _Z95 * math.sqrt(count * (n - count) / n + _Z95**2 / 4)
    low, high = (middle - spread) / (n + _Z95**2), (middle + spread) / (n + _Z95**2)
    return (0.0 if count == 0 else low), (1.0 if count == n else high)


class PixelCalibrator:
    """Choose the pixel threshold from the anomaly maps of normal images, one at a time.

    The smallest value that at most a share fpr of all pixels exceeds. Up to `budget` pixels the maps are
    kept (4 bytes a pixel, 12 at the peak) and the value is exact. Beyond, they become histograms of relative
    width 2^-11 (8 bytes a distinct bin an image, 24 MiB in all besides): the value is the next bin edge
    above, and the realized rate stays exact.

    Pixels of one image are not independent, so the interval of the rate is a percentile bootstrap over
    images (2000 resamples, seeded); of one image it is unknown (None), of fewer than about ten it is too
    narrow.

    Args:
        fpr: wanted false-positive rate in (0, 1), taken as the decimal it prints as.
        budget: number of pixels kept exactly.
        seed: of the bootstrap.

    Raises:
        InputError: fpr outside (0, 1).

    References:
        Davison, Hinkley. Bootstrap Methods and their Application. Cambridge, 1997. Section 5.3.
    """

    def __init__(self, fpr: float, *, budget: int = 2**26, seed: int = 0) -> None:
        self.fpr, self.budget, self.seed = fpr, budget, seed
        _fraction(fpr)
        self._maps: list[NDArray[np.float32]] = []
        self._sizes: list[int] = []
        self._pooled: StreamedRanking | None = None
        self._binned: list[tuple[NDArray[np.uint32], NDArray[np.uint32]]] = []

    def update(self, map: ArrayLike | Tensor, source: str = "map") -> None:
        """Add the anomaly map of one normal image.

        Args:
            map: (H, W) or any shape, one image, compared as float32; infinities rank as numbers do.
            source: what an error calls it.

        Raises:
            InputError: the map is empty or has NaN; nothing was added then.
        """
        pixels = _numbers(map, source).astype(np.float32)
        if not pixels.size:
            raise InputError(f"{source}: the map is empty; give one number a pixel")
        self._sizes.append(pixels.size)
        self._maps.append(pixels)
        if self._pooled is None and sum(self._sizes) > self.budget:
            self._pooled = StreamedRanking()
        while self._pooled is not None and self._maps:
            kept = self._maps.pop(0)
            self._pooled.update(kept, np.zeros(kept.size, dtype=np.bool_))
            index, count = np.unique(bin_index(kept, self._pooled.bins), return_counts=True)
            self._binned.append((index.astype(np.uint32), count.astype(np.uint32)))

    def threshold(self, *, method: str = "held-out", fpr: float | None = None) -> Threshold:
        """Choose the threshold from the maps so far.

        Args:
            method: kept in the result.
            fpr: another rate than the constructor's, so that one calibrator serves several.

        Returns:
            Threshold of level "pixel".

        Raises:
            InputError: no map was given, the threshold would be infinite, or fpr is outside (0, 1).
        """
        fpr = self.fpr if fpr is None else fpr
        total = sum(self._sizes)
        if not total:
            raise InputError("no normal map was given; a pixel threshold needs at least one normal image")
        allowed = math.floor(total * _fraction(fpr))
        if self._pooled is None:
            pixels = np.concatenate(self._maps)
            value = _finite(np.partition(pixels, total - 1 - allowed)[total - 1 - allowed], fpr)
            above = [int(np.count_nonzero(kept > np.float32(value))) for kept in self._maps]
        else:
            value = _finite(self._pooled.threshold(allowed)[0], fpr)
            last = int(bin_index(np.array([value]), self._pooled.bins)[0])
            above = [int(count[index > last].sum()) for index, count in self._binned]
        return Threshold(
            level="pixel",
            fpr=fpr,
            value=value,
            realized_rate=sum(above) / total,
            interval=_bootstrap(np.array(above), np.array(self._sizes), self.seed),
            n_images=len(self._sizes),
            n_pixels=total,
            method=method,
        )


def _bootstrap(above: NDArray[np.int64], sizes: NDArray[np.int64], seed: int) -> tuple[float, float] | None:
    n = len(sizes)
    if n == 1:
        return None
    rng = np.random.default_rng(seed)
    draws = (rng.integers(n, size=n) for _ in range(_RESAMPLES))
    rates = [above[draw].sum() / sizes[draw].sum() for draw in draws]
    low, high = np.quantile(rates, (0.025, 0.975))
    return float(low), float(high)


def _fraction(fpr: float) -> Fraction:
    """Take 0.05 as 5/100, not as the binary number nearest to it, so that 19 images suffice."""
    if not 0 < fpr < 1:
        raise InputError(f"fpr is {fpr}; give a rate above 0 and below 1, such as 0.05")
    return Fraction(str(float(fpr)))


def _numbers(values: ArrayLike | Tensor, name: str) -> NDArray[Any]:
    array = to_numpy(values).reshape(-1)
    if array.dtype.kind not in "fiub":
        raise InputError(f"{name}: {array.dtype} values; give real numbers")
    if missing := int(np.count_nonzero(np.isnan(array))):
        raise InputError(
            f"{name}: {missing} of {array.size} values are NaN; a threshold from them would mean nothing, so "
            "repair or leave out that image"
        )
    return array


def _finite(value: Any, fpr: float) -> float:
    if not math.isfinite(value):
        raise InputError(
            f"the threshold at fpr {fpr} would be {value}: too many normal scores are infinite; repair what "
            "made them or ask for a higher fpr"
        )
    return float(value)
