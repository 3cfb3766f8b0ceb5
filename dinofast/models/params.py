"""Checks of constructor arguments, in the same words for every model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dinofast.errors import InputError


def check_choice(allowed: Sequence[str], **values: object) -> None:
    """Raise InputError unless every value, given by its name, is one of `allowed`."""
    for name, value in values.items():
        if value not in allowed:
            raise InputError(f"unknown {name} {value!r}; one of {', '.join(allowed)}")


def check_whole(least: int, *, or_none: bool = False, **values: object) -> None:
    """Raise InputError unless every value, given by its name, is a whole number, at least `least`."""
    for name, value in values.items():
        if or_none and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} must be a whole number, at least {least}, got {value!r}")


def check_number(words: str, fits: Callable[[float], bool], **values: object) -> None:
    """Raise InputError unless every value, given by its name, is a finite number that fits.

    Args:
        words: what `fits` asks for, such as "above 0".
        fits: tells whether a finite number will do.
        values: what to check.
    """
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not fits(value):  # type: ignore[arg-type]
            raise InputError(f"{name} must be a finite number, {words}, got {value!r}")


def check_seed(seed: object) -> None:
    """Raise InputError unless a seed is a whole number in [0, 2**63), as generators take it."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise InputError(f"seed must be a whole number in [0, 2**63), got {seed!r}")
