"""Rows and parameters as scikit-learn's estimators take them, tensors of any device included."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import validate_data
from torch import Tensor

from dinofast.errors import InputError
from dinofast.interop import to_tensor


def rows_of(estimator: Any, X: Any, *, reset: bool = False) -> Tensor:
    """Check rows (N, D) as scikit-learn does and view them as a tensor.

    Args:
        estimator: learns D from the rows, or has them checked against its own.
        X: what scikit-learn takes as dense rows, or a torch or CuPy matrix.
        reset: whether the estimator is to learn D.

    Returns:
        (N, D), N >= 1, finite; float32 or float64, from torch and CuPy also float16 and bfloat16.

    Raises:
        ValueError: not a matrix, no rows, NaN or infinite values, or another D.
        TypeError: sparse rows.
    """
    given = to_tensor(X, "X").detach() if is_device_array(X) else None
    if given is None:
        return to_tensor(validate_data(estimator, X, reset=reset, dtype=[np.float64, np.float32]), "X")
    name = type(estimator).__name__
    if given.dim() != 2 or not all(given.shape):
        raise InputError(f"X must be a matrix with rows and channels, got {tuple(given.shape)}")
    if not given.is_floating_point():
        given = given.double()
    if not bool(given.isfinite().all()):
        raise InputError("X holds NaN or infinite values; remove those rows")
    if reset:
        estimator.n_features_in_ = given.shape[1]
    elif given.shape[1] != estimator.n_features_in_:
        raise InputError(
            f"X has {given.shape[1]} features, but {name} was fitted on {estimator.n_features_in_}"
        )
    return given


def is_device_array(X: Any) -> bool:
    """Say whether rows are a torch or CuPy array, which scikit-learn's own checks do not take."""
    if isinstance(X, Tensor):
        return True
    return not isinstance(X, np.ndarray) and hasattr(X, "__cuda_array_interface__")


def check_whole(least: int, **named: Any) -> None:
    """Raise InputError unless these parameters are whole numbers of at least `least`."""
    for name, value in named.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_choice(choices: tuple[str, ...], **named: Any) -> None:
    """Raise InputError unless these parameters are among the choices."""
    for name, value in named.items():
        if not isinstance(value, str) or value not in choices:
            raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_number(least: float, *, above: bool = False, **named: Any) -> None:
    """Raise InputError unless these parameters are finite numbers from `least` on, or above it."""
    for name, value in named.items():
        fits = isinstance(value, numbers.Real) and math.isfinite(value)
        if not fits or (value <= least if above else value < least):
            raise InputError(f"{name} must be a number {'above' if above else 'from'} {least}, got {value!r}")


def as_floats(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Give rows for an operator beside parameters of a dtype: half precision stays, else that dtype."""
    return (
        rows if rows.dtype in (torch.float16, torch.bfloat16) and dtype == torch.float32 else rows.to(dtype)
    )
