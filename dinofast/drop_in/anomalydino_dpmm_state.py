"""States of anomalydino-dpmm's mixture, in the keys and shapes of its state_dict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinofast.errors import InputError
from dinofast.interop import to_tensor
from dinofast.models.mixture import Mixture

NAMES = {
    "resp_stat": "mass",
    "mean_stat": "first",
    "cov_stat": "second",
    "v": "sticks",
    "mean": "means",
    "cov": "covariances",
}
"""The host's key of a state tensor -> the name in `Mixture`."""
TOLERANCE = 1e-2
"""How far from 1 the responsibilities of a row may sum: half precision keeps within."""


def square(wide: Tensor) -> Tensor:
    """Give matrices (K, D, D), of diagonals (K, D) if need be."""
    return wide if wide.dim() == 3 else wide.diag_embed()


def exported(mixture: Mixture) -> dict[str, Any]:
    """Give a state as the host saves it: float32 copies, matrices (K, D, D), without α."""
    found: dict[str, Any] = {"iterations": mixture.iteration}
    for key, name in NAMES.items():
        tensor = getattr(mixture, name)
        found[key] = (square(tensor) if key in ("cov_stat", "cov") else tensor).float().clone()
    return found


def imported(
    state: Mapping[str, Any], n_components: int, d: int, *, full: bool, device: torch.device, alpha: float
) -> Mixture:
    """Take what the host or `exported` gave, copied.

    Args:
        state: by the host's keys; `alpha` may be among them.
        n_components: K.
        d: channels D.
        full: whether more than the diagonals of the matrices counts.
        device: where the mixture is to lie.
        alpha: α, where the state has none.

    Raises:
        InputError: keys are missing, shapes are others, NaN or infinite values, or covariances that are not
            positive definite.
    """
    missing = {"iterations", *NAMES} - set(state)
    if missing:
        raise InputError(f"state_dict has no {', '.join(sorted(missing))}")
    k = n_components
    shapes = {"resp_stat": (k,), "v": (k,), "mean": (k, d), "mean_stat": (k, d)}
    found: dict[str, Tensor] = {}
    for key, name in NAMES.items():
        tensor = to_tensor(state[key], key).detach().to(device)
        shape = shapes.get(key, (k, d, d))
        if tensor.shape != shape:
            raise InputError(f"{key} must be {shape}, got {tuple(tensor.shape)}")
        if tensor.dim() == 3 and not full:
            tensor = tensor.diagonal(dim1=1, dim2=2)
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{key} holds NaN or infinite values; take the state of an earlier step")
        if key == "cov":
            _check_positive(tensor)
        dtype = torch.float64 if tensor.dim() == 1 else torch.float32
        found[name] = tensor.to(dtype, copy=True).contiguous()
    number = float(state.get("alpha", alpha))
    if not 0 < number < math.inf:
        raise InputError(f"alpha must be finite and above 0, got {number}")
    concentration = torch.tensor(number, dtype=torch.float64, device=device)
    return Mixture(**found, concentration=concentration, iteration=int(state["iterations"]))


def responsibilities(given: Tensor) -> Tensor:
    """Give responsibilities (N, K) of what may be their logarithms.

    Args:
        given: (N, K) in [0, 1]; with a negative number, or of zeros only, logarithms.

    Raises:
        InputError: rows that do not sum to 1 within a hundredth, or NaN.
    """
    logs = bool((given < 0).any()) or not bool(given.any())
    shares = given.exp() if logs else given
    total = shares.sum(dim=1)
    wrong = ~((total - 1).abs() <= TOLERANCE)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise InputError(
            f"resp, taken for {'logarithms' if logs else 'responsibilities'}: row {row} sums to "
            f"{float(total[row]):.6g} instead of 1; give responsibilities in [0, 1], or the logarithms of all"
        )
    return shares


def _check_positive(covariances: Tensor) -> None:
    """Refuse covariances (K, D, D), or their diagonals (K, D), that are not positive definite."""
    if covariances.dim() == 3:
        bad = torch.linalg.cholesky_ex(covariances.double()).info != 0
    else:
        bad = (covariances <= 0).any(dim=1)
    if bool(bad.any()):
        raise InputError(
            f"cov of component {int(bad.nonzero()[0, 0])} is not positive definite; "
            "take the state of an earlier step"
        )
