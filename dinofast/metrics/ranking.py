"""AUROC, AUPR and average precision of raw scores: no sigmoid, no binning, ties handled.

All three need the same few counts at every distinct score that a positive has. Positives and negatives are
sorted apart and the counts found by binary search, so memory is one copy of the scores in their own dtype,
one byte a score for masks, and 16 bytes a distinct positive score. CUDA tensors are copied to the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dinofast.errors import InputError

_CHUNK = 2**20


class Groups(NamedTuple):
    """Counts at distinct scores, each array (G,) int64; only scores that at least one positive has.

    Attributes:
        positives: positives that have exactly this score.
        tp_above: positives with a higher score.
        fp_above: negatives with a higher score.
        fp_through: negatives with this or a higher score.
    """

    positives: NDArray[np.int64]
    tp_above: NDArray[np.int64]
    fp_above: NDArray[np.int64]
    fp_through: NDArray[np.int64]


def auroc(scores: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
    """Compute the area under the ROC curve: the chance that a positive outranks a negative, ties half.

    The pairs are counted in integers, so the result is the true ratio rounded once.

    Args:
        scores: any shape, real numbers, higher is more abnormal; infinities rank as numbers do.
        labels: same shape or flattened; bool or 0 and 1, 1 is abnormal.

    Returns:
        Area in [0, 1]; 0.5 is chance.

    Raises:
        InputError: empty, NaN scores, labels other than 0 and 1, only one class, or sizes differ.

    >>> auroc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    0.75
    """
    scores, labels = check(scores, labels)
    wins = sum(twice_wins(groups, int(np.count_nonzero(~labels))) for groups in _groups(scores, labels))
    positives = int(np.count_nonzero(labels))
    return wins / (2 * positives * (labels.size - positives))


def aupr(scores: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
    """Compute the trapezoidal area under the precision-recall curve.

    Equals `sklearn.metrics.auc(recall, precision)` of `precision_recall_curve`. The straight lines between
    points make it more generous than `average_precision`, above all with ties: constant scores give
    (1 + P / n) / 2 here and P / n there.

    Args:
        scores: as for `auroc`.
        labels: as for `auroc`.

    Returns:
        Area in [0, 1].

    Raises:
        InputError: as for `auroc`.

    >>> round(aupr([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]), 6)
    0.791667
    """
    scores, labels = check(scores, labels)
    return math.fsum(map(trapezoids, _groups(scores, labels))) / int(np.count_nonzero(labels))


def average_precision(scores: ArrayLike | Tensor, labels: ArrayLike | Tensor) -> float:
    """Compute average precision: the mean, over positives, of the precision at each one's score.

    Equals `sklearn.metrics.average_precision_score`.

    Args:
        scores: as for `auroc`.
        labels: as for `auroc`.

    Returns:
        Mean precision in (0, 1].

    Raises:
        InputError: as for `auroc`.

    >>> round(average_precision([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]), 6)
    0.833333
    """
    scores, labels = check(scores, labels)
    return math.fsum(map(steps, _groups(scores, labels))) / int(np.count_nonzero(labels))


def check(
    scores: ArrayLike | Tensor, labels: ArrayLike | Tensor, both_classes: bool = True
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Flatten scores and labels, and refuse what no ranking metric can use.

    Args:
        scores: as for `auroc`.
        labels: as for `auroc`.
        both_classes: whether one class alone, or nothing at all, is refused.

    Returns:
        Scores (n,) in a real dtype that numpy sorts, and labels (n,) bool.

    Raises:
        InputError: as for `auroc`.
    """
    values, truth = to_numpy(scores), to_numpy(labels)
    shapes = [tuple(side for side in array.shape if side != 1) for array in (values, truth)]
    if values.size != truth.size or (shapes[0] != shapes[1] and min(map(len, shapes)) > 1):
        raise InputError(
            f"scores have shape {values.shape} and labels {truth.shape}; give one label for each score"
        )
    if values.dtype.kind not in "fiub":
        raise InputError(f"scores are {values.dtype}; give real numbers")
    values, truth = values.reshape(-1), truth.reshape(-1)
    if values.dtype.kind == "f" and (missing := int(np.count_nonzero(np.isnan(values)))):
        raise InputError(
            f"{missing} of {values.size} scores are NaN and cannot be ranked; repair what made them, or "
            "leave those values out of scores and labels"
        )
    positive = truth if truth.dtype == np.bool_ else truth == 1
    if truth.dtype != np.bool_ and (other := int(np.count_nonzero(~positive & (truth != 0)))):
        raise InputError(
            f"{other} of {truth.size} labels are neither 0 nor 1; binarize them first, for instance mask > 0"
        )
    if both_classes:
        if not values.size:
            raise InputError("scores are empty; give at least one normal and one abnormal value")
        n_positives = int(np.count_nonzero(positive))
        if n_positives in (0, values.size):
            kind = "abnormal (1)" if n_positives else "normal (0)"
            raise InputError(
                f"all {values.size} labels are {kind}; ranking needs both classes, so add images of the other"
            )
    return values, positive


def precision(tp: NDArray[np.int64], fp: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute tp / (tp + fp), 1 where nothing was selected; arrays (G,), results in [0, 1]."""
    selected = tp + fp
    ratio: NDArray[np.float64] = np.divide(tp, selected, out=np.ones(selected.shape), where=selected > 0)
    return ratio


def twice_wins(groups: Groups, n_negatives: int) -> int:
    """Count twice the (positive, negative) pairs in the right order, ties once; an exact integer."""
    beaten = 2 * n_negatives - groups.fp_above - groups.fp_through
    return exact_dot(groups.positives, beaten)


def trapezoids(groups: Groups) -> float:
    """Sum the trapezoids under the precision-recall curve, in positives (recall times P)."""
    before = precision(groups.tp_above, groups.fp_above)
    after = precision(groups.tp_above + groups.positives, groups.fp_through)
    return float(np.sum(groups.positives * (before + after))) / 2


def steps(groups: Groups) -> float:
    """Sum the precision at each positive's score."""
    return float(np.sum(groups.positives * precision(groups.tp_above + groups.positives, groups.fp_through)))


def exact_dot(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Compute the dot product of two non-negative integer arrays (G,) without overflow."""
    if not a.size or int(a.sum()) * int(b.max()) < 2**63:
        return int(np.dot(a, b))
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def to_numpy(values: ArrayLike | Tensor) -> NDArray[Any]:
    """Give a numpy array of the same shape and values; bfloat16, which numpy lacks, becomes float32."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)


def _groups(scores: NDArray[Any], labels: NDArray[np.bool_]) -> Iterator[Groups]:
    positives, negatives = scores[labels], scores[~labels]
    positives.sort()
    negatives.sort()
    first = np.ones(positives.size, dtype=np.bool_)
    np.not_equal(positives[1:], positives[:-1], out=first[1:])
    edges = np.append(np.flatnonzero(first), positives.size)
    for at in range(0, edges.size - 1, _CHUNK):
        chunk = edges[at : at + _CHUNK + 1]
        values = positives[chunk[:-1]]
        yield Groups(
            positives=np.diff(chunk),
            tp_above=positives.size - chunk[1:],
            fp_above=negatives.size - np.searchsorted(negatives, values, side="right"),
            fp_through=negatives.size - np.searchsorted(negatives, values, side="left"),
        )
