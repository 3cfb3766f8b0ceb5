"""Ranking metrics of more scores than memory holds, with bounds that always contain the exact value.

Scores are rounded to float32, whose bit patterns, with the sign folded over, rise as the numbers do; the
leading bits are the bin. Rounding and binning never reverse an order, so the exact metric of the scores
(float64 included) differs from the binned one only by the unknown order inside bins, and the best and the
worst such order are known:

With T positives and F negatives above a bin of p positives and n negatives, and g(t, f) = t / (t + f):

* AUROC: the bin decides p·n pairs; counting half of each errs by at most p·n / (2 P N).
* AP: a positive's precision is at most g(T + p, F) (all positives tied, above all negatives); the j-th is
  at least g(T + j, F + n) (all negatives above, positives distinct). The sum of the latter is at least both
  its chord and p - c·log(1 + p / (T + c + 1/2)), c = F + n, for 1/x is convex.
* AUPR: g is concave in t, so splitting a step raises the area and tying lowers it: at most the integral
  p - F·log(1 + p / (T + F)), at least p·(g(T, F + n) + g(T + p, F + n)) / 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dinofast.errors import InputError
from dinofast.metrics.ranking import Groups, check, exact_dot, precision, steps, trapezoids, twice_wins

_CHUNK = 2**22
_INFINITY, _NEGATIVE_ZERO = 0xFF800000, 0x7FFFFFFF
_ROUNDING = 1e-12


class Bounded(NamedTuple):
    """A value that is known up to an interval: `low` <= exact <= `high`.

    Attributes:
        value: the metric as if all scores of a bin were tied.
        low: no order inside the bins gives less.
        high: no order inside the bins gives more.
    """

    value: float
    low: float
    high: float


class StreamedRanking:
    """Histograms of normal and abnormal scores, from which the ranking metrics are bounded.

    Memory is 16 bytes a bin whatever the number of scores: 16 MiB by default. The relative width of a bin
    is 2^(9 - log2(bins)), 2^-11 by default, from 1e-38 to 3e38 and their negatives alike.

    Args:
        bins: a power of two from 2^9 (one bin for each sign and power of two) to 2^26.

    Raises:
        InputError: `bins` is not such a number.

    >>> ranking = StreamedRanking()
    >>> ranking.update([0.1, 0.4], [0, 0])
    >>> ranking.update([0.35, 0.8], [1, 1])
    >>> ranking.auroc()
    Bounded(value=0.75, low=0.75, high=0.75)
    """

    def __init__(self, bins: int = 2**20) -> None:
        if bins & (bins - 1) or not 2**9 <= bins <= 2**26:
            raise InputError(f"bins is {bins}; give a power of two from 512 to {2**26}")
        self.bins = bins
        self._counts: NDArray[np.int64] = np.zeros((2, bins), dtype=np.int64)

    def update(self, scores: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> None:
        """Add scores; one class alone, or none, is welcome.

        Args:
            scores: any shape, real numbers; infinities rank as numbers do, beyond float32 as infinities.
            labels: same shape or flattened; bool or 0 and 1, 1 is abnormal.

        Raises:
            InputError: NaN scores, labels other than 0 and 1, or sizes differ; nothing was added then.
        """
        values, positive = check(scores, labels, both_classes=False)
        for at in range(0, values.size, _CHUNK):
            key = bin_index(values[at : at + _CHUNK], self.bins)
            key += positive[at : at + _CHUNK] * np.int64(self.bins)
            self._counts += np.bincount(key, minlength=2 * self.bins).reshape(2, self.bins)

    def merge(self, other: StreamedRanking) -> None:
        """Add all scores that `other` has seen; it stays as it was.

        Raises:
            InputError: the numbers of bins differ.
        """
        if other.bins != self.bins:
            raise InputError(f"cannot merge rankings of {other.bins} and {self.bins} bins; use one number")
        self._counts += other._counts

    def auroc(self) -> Bounded:
        """Bound the area under the ROC curve; `high - low` is the share of pairs that fall into one bin.

        Returns:
            Value in the middle of the bounds; all three in [0, 1].

        Raises:
            InputError: one class has no scores yet.
        """
        groups, positives, negatives = self._groups()
        wins = twice_wins(groups, negatives)
        undecided = exact_dot(groups.positives, groups.fp_through - groups.fp_above)
        pairs = 2 * positives * negatives
        return Bounded(wins / pairs, (wins - undecided) / pairs, (wins + undecided) / pairs)

    def aupr(self) -> Bounded:
        """Bound the trapezoidal area under the precision-recall curve.

        Returns:
            Value with all scores of a bin tied; all three in [0, 1].

        Raises:
            InputError: one class has no scores yet.
        """
        groups, positives, _ = self._groups()
        p, tp, fp = groups.positives, groups.tp_above, groups.fp_above
        low = trapezoids(groups._replace(fp_above=groups.fp_through))
        integral = p - fp * np.log1p(p / np.maximum(tp + fp, 1))
        chord = p * (precision(tp, fp) + precision(tp + p, fp)) / 2
        high = float(np.sum(np.where(p == 1, chord, integral)))
        return _bounded(trapezoids(groups), low, high, positives)

    def average_precision(self) -> Bounded:
        """Bound average precision.

        Returns:
            Value with all scores of a bin tied; all three in [0, 1].

        Raises:
            InputError: one class has no scores yet.
        """
        groups, positives, _ = self._groups()
        p, tp, fp = groups.positives, groups.tp_above, groups.fp_through
        logarithm = p - fp * np.log1p(p / (tp + fp + 0.5))
        chord = p * (precision(tp + 1, fp) + precision(tp + p, fp)) / 2
        low = float(np.sum(np.maximum(logarithm, chord)))
        high = steps(groups._replace(fp_through=groups.fp_above))
        return _bounded(steps(groups), low, high, positives)

    def threshold(self, allowed: int) -> tuple[float, int]:
        """Find the smallest bin edge that at most `allowed` normal scores exceed.

        Args:
            allowed: number of normal scores that may lie above, fewer than all of them.

        Returns:
            The edge, a float32 value no score of its bin exceeds, infinite only where scores were; and the
            number of normal scores above it, exact for float32 scores.

        Raises:
            InputError: `allowed` is negative or not below the number of normal scores.
        """
        normal = self._counts[0]
        total = int(normal.sum())
        if not 0 <= allowed < total:
            raise InputError(
                f"{allowed} of {total} normal scores may exceed the threshold; allow 0 to {total - 1}"
            )
        above = total - np.cumsum(normal)
        index = int(np.flatnonzero(above <= allowed)[0])
        return bin_edge(index, self.bins), int(above[index])

    def _groups(self) -> tuple[Groups, int, int]:
        negatives, positives = (int(row.sum()) for row in self._counts)
        if not positives or not negatives:
            raise InputError(
                f"{positives} abnormal and {negatives} normal scores; ranking needs both classes"
            )
        at = np.flatnonzero(self._counts[1])
        p, n = self._counts[1, at], self._counts[0]
        through = np.cumsum(n[::-1])[::-1][at]
        return Groups(p, positives - np.cumsum(p), through - n[at], through), positives, negatives


def bin_index(scores: NDArray[Any], bins: int) -> NDArray[np.int64]:
    """Number the bin of each score (n,), in [0, bins); rises with the score, 0.0 and -0.0 share one."""
    with np.errstate(over="ignore"):
        bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))
    index: NDArray[np.int64] = (ordered >> (33 - bins.bit_length())).astype(np.int64)
    return index


def bin_edge(index: int, bins: int) -> float:
    """Give the largest float32 number in a bin."""
    ordered = min(((index + 1) << (33 - bins.bit_length())) - 1, _INFINITY)
    ordered -= ordered == _NEGATIVE_ZERO  # equals 0.0, which is in the next bin
    bits = ordered ^ (0x80000000 if ordered >> 31 else 0xFFFFFFFF)
    return float(np.array(bits, dtype=np.uint32).view(np.float32))


def _bounded(value: float, low: float, high: float, positives: int) -> Bounded:
    return Bounded(
        value / positives,
        max(0.0, low / positives - _ROUNDING),
        min(1.0, high / positives + _ROUNDING),
    )
