"""Rows as the k-means packages' names take them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinofast.errors import InputError
from dinofast.interop import is_array, to_tensor


def rows_of(x: Any, name: str) -> Tensor:
    """View an array, or nested lists, as numbers that `kmeans_step` takes.

    Args:
        x: real numbers of any shape, dtype and library; or lists of them.
        name: what errors call it.

    Returns:
        The same shape; float16 and bfloat16 stay, everything else is float32.

    Raises:
        InputError: no numbers, lists of unequal length, or complex numbers.
    """
    if not is_array(x) and not hasattr(x, "__array_interface__"):
        try:
            x = np.asarray(x, np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name}: no array of numbers ({error}); give rows of equal length") from error
    rows = to_tensor(x, name).detach()
    if rows.is_complex():
        raise InputError(f"{name} must be real numbers, got {rows.dtype}; give the real part")
    return rows if rows.dtype in (torch.float16, torch.bfloat16) else rows.to(torch.float32)
