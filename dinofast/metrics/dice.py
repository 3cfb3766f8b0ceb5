"""Dice at given thresholds, micro-averaged: the pixels of all images are pooled first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dinofast.errors import InputError
from dinofast.metrics.ranking import check


class PooledDice:
    """Count true and false positives of many maps at a few thresholds; memory does not grow with the maps.

    A pixel is called anomalous when its score, as float32, lies strictly above the threshold.

    Args:
        thresholds: T finite numbers, in any order; compared as float32.

    Raises:
        InputError: no threshold, or one that is not finite as float32.

    >>> dice = PooledDice([0.3])
    >>> dice.update([0.1, 0.4, 0.35, 0.2], [0, 0, 1, 1])
    >>> dice.dice()
    [0.5]
    """

    def __init__(self, thresholds: Sequence[float]) -> None:
        self._thresholds = np.asarray(thresholds, np.float32).reshape(-1)
        if not self._thresholds.size or not np.isfinite(self._thresholds).all():
            raise InputError(f"thresholds {list(thresholds)}: give at least one, all finite as float32")
        self._true: NDArray[np.int64] = np.zeros(self._thresholds.size, np.int64)
        self._false: NDArray[np.int64] = np.zeros(self._thresholds.size, np.int64)
        self._positives = self._negatives = 0

    def update(self, scores: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> None:
        """Add scores; one class alone, or none, is welcome.

        Args:
            scores: any shape, real numbers.
            labels: same shape or flattened; bool or 0 and 1, 1 is abnormal.

        Raises:
            InputError: NaN scores, labels other than 0 and 1, or sizes differ; nothing was added then.
        """
        values, positive = check(scores, labels, both_classes=False)
        values = values.astype(np.float32, copy=False)
        for i, threshold in enumerate(self._thresholds):
            above = values > threshold
            hits = int(np.count_nonzero(above & positive))
            self._true[i] += hits
            self._false[i] += int(np.count_nonzero(above)) - hits
        n_positives = int(np.count_nonzero(positive))
        self._positives += n_positives
        self._negatives += values.size - n_positives

    def dice(self) -> list[float]:
        """Give 2 TP / (2 TP + FP + FN) for each threshold, in their order.

        Returns:
            T numbers in [0, 1].

        Raises:
            InputError: there are no abnormal scores, so that no overlap is defined.
        """
        if not self._positives:
            raise InputError("no abnormal pixel was given; Dice needs masks that mark something")
        predicted = self._true + self._false
        return [float(v) for v in 2 * self._true / (predicted + self._positives)]

    def false_positive_rates(self) -> list[float]:
        """Give the share of normal scores above each threshold, in their order.

        Returns:
            T numbers in [0, 1].

        Raises:
            InputError: there are no normal scores.
        """
        if not self._negatives:
            raise InputError("no normal pixel was given; a false-positive rate needs some")
        return [float(v) for v in self._false / self._negatives]
