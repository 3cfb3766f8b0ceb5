"""Whether one method beats another on the same images: a paired permutation test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from dinofast.errors import InputError
from dinofast.metrics.ranking import to_numpy

ALTERNATIVES = ("two-sided", "greater", "less")
_CHUNK = 2**22


@dataclass(frozen=True)
class PairedTest:
    """What the test found.

    Attributes:
        difference: mean of first minus second.
        p_value: chance of a mean at least as extreme if the signs were coin flips, in (0, 1].
        n_pairs: images compared.
        n_permutations: sign patterns drawn.
        alternative: "two-sided", "greater" or "less".
    """

    difference: float
    p_value: float
    n_pairs: int
    n_permutations: int
    alternative: str


def paired_permutation(
    first: ArrayLike | Tensor,
    second: ArrayLike | Tensor,
    *,
    n_permutations: int = 10_000,
    alternative: str = "two-sided",
    seed: int = 0,
) -> PairedTest:
    """Test the mean difference of paired values by random flips of the differences' signs.

    The observed pattern counts as one more draw, so that the p-value is never 0: with b of n draws at least
    as extreme it is (b + 1) / (n + 1). Means that differ by rounding alone (1e-12 of the mean size of the
    differences) are equally extreme.

    Args:
        first: one number an image (n,), finite.
        second: the same images' numbers by the other method (n,).
        n_permutations: sign patterns to draw, at least 1.
        alternative: "two-sided"; "greater", first above second; or "less".
        seed: of the draws.

    Returns:
        The difference and its p-value. Equal methods give p = 1.

    Raises:
        InputError: no pairs, lengths differ, NaN or infinite values, an unknown alternative, or no whole
            number of permutations, at least 1.

    References:
        Phipson, Smyth. Permutation P-values should never be zero. SAGMB 9(1), 2010.

    >>> paired_permutation([0.9, 0.8, 0.9, 0.8], [0.9, 0.8, 0.9, 0.8]).p_value
    1.0
    """
    a, b = (to_numpy(v).astype(np.float64).reshape(-1) for v in (first, second))
    if a.size != b.size or not a.size:
        raise InputError(f"{a.size} and {b.size} values; give one pair an image, at least one")
    difference = a - b
    if bad := int(np.count_nonzero(~np.isfinite(difference))):
        raise InputError(f"{bad} of {a.size} pairs hold NaN or infinity; leave these images out of both")
    if alternative not in ALTERNATIVES:
        raise InputError(f"alternative {alternative!r}; one of {', '.join(ALTERNATIVES)}")
    if not isinstance(n_permutations, int | np.integer) or n_permutations < 1:
        raise InputError(f"n_permutations is {n_permutations!r}; give a whole number, at least 1")
    observed = float(difference.mean())
    slack = 1e-12 * float(np.abs(difference).mean())
    rng, extreme, left = np.random.default_rng(seed), 0, n_permutations
    rows = max(1, _CHUNK // a.size)
    while left:
        drawn = min(rows, left)
        signs = rng.integers(0, 2, (drawn, a.size), np.int8) * 2 - 1
        means = signs @ difference / a.size
        if alternative == "two-sided":
            hits = np.abs(means) >= abs(observed) - slack
        else:
            hits = means >= observed - slack if alternative == "greater" else means <= observed + slack
        extreme += int(np.count_nonzero(hits))
        left -= drawn
    return PairedTest(observed, (extreme + 1) / (n_permutations + 1), a.size, n_permutations, alternative)
