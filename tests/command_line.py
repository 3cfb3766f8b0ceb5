"""What the tests of the command line share; the fixtures `call` and `tree` are in conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

LITE = ("--backbone", "efficientnet-lite0", "--size", "96")
"""Options for the backbone of the fixture `lite0`."""


class Result(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Result]
