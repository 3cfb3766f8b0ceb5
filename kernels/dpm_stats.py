"""dpm_stats: chunks of rows are bounded, the pairs that matter computed, and summed by their components."""

from __future__ import annotations

import torch
import triton
from dinofast.kernels import full_covariance, responsibilities, weighted_sums
from dinofast.kernels.full_covariance import Full
from dinofast.kernels.responsibilities import Diagonal
from dinofast.kernels.tile import Variant
from torch import Tensor

PAIRS = {"diagonal": 1 << 23, "full": 1 << 22}
"""Pairs held at a time, each in a place of its own: 6 bytes, 14 for full covariance; 48 and 56 MiB."""
MOST_ROWS = 1 << 15
"""Rows in a chunk: int16 numbers them."""
FEWEST_ROWS = 64


def dpm_stats(
    x: Tensor,
    means: Tensor,
    precisions: Tensor,
    log_weights: Tensor,
    drop: float,
    log_likelihood: Tensor,
    sums: weighted_sums.Sums,
) -> None:
    """Fill log_likelihood (N,), count (K,), first (K, D) and second (K, D) or, for full, (K, D, D).

    Channels of x must be contiguous, its rows may be strided; precisions (K,) are spherical. Precisions that
    are not positive (definite) make everything NaN. Nothing waits for the device: sizes of memory and of
    launches follow from those of the arguments, and how many pairs matter is counted and read there.
    """
    n, k = x.shape[0], means.shape[0]
    model = (Full if precisions.dim() == 3 else Diagonal)(means, precisions, log_weights, drop)
    most = PAIRS["full" if isinstance(model, Full) else "diagonal"] // k // 16 * 16
    chunk = min(MOST_ROWS, max(FEWEST_ROWS, most), max(16, triton.cdiv(n, 16) * 16))
    weights = torch.empty((k, chunk), dtype=torch.float32, device=x.device)
    index = torch.empty((k, chunk), dtype=torch.int16, device=x.device)
    used = torch.empty(k, dtype=torch.int32, device=x.device)
    for result in sums if n == 0 else ():
        result.zero_()
    for start in range(0, n, chunk):
        rows, found = x[start : start + chunk], log_likelihood[start : start + chunk]
        if isinstance(model, Full):
            model.assign(rows, weights, found, index, used)
        else:
            model.assign(rows, weights, found)
        weighted_sums.add_up(rows, weights, index, used, sums, int(start > 0))


def variants() -> list[Variant]:
    """List the ways in which the launcher calls its kernels."""
    found: list[Variant] = []
    for part in (responsibilities, full_covariance, weighted_sums):
        found += part.variants()
    return found
