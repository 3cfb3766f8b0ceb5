"""States of anomalydino-dpmm's mixture, in the keys and shapes of its state_dict."""

from __future__ import annotations

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
        InputError: keys are missing, or shapes are others.
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
        dtype = torch.float64 if tensor.dim() == 1 else torch.float32
        found[name] = tensor.to(dtype, copy=True).contiguous()
    concentration = torch.tensor(float(state.get("alpha", alpha)), dtype=torch.float64, device=device)
    return Mixture(**found, concentration=concentration, iteration=int(state["iterations"]))
