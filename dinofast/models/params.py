"""Checks of constructor arguments, in the same words for every model."""

from __future__ import annotations

from collections.abc import Sequence

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
