"""Other projects' names on dinofast: change an import, or patch the host for the length of a block."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from dinofast.errors import InputError

__all__ = ["patch"]

REPLACED = {
    "faiss": "dinofast.drop_in.faiss",
    "fastkmeans": "dinofast.drop_in.fastkmeans",
    "flash_kmeans": "dinofast.drop_in.flash_kmeans",
}
"""Module that hosts import -> the one that stands in for it."""
PARTS = {"faiss": ("contrib", "contrib.torch_utils")}
"""Modules below it that hosts import for what the stand-in does anyway: they are empty."""


@contextmanager
def patch(host: str) -> Iterator[ModuleType]:
    """Let a host's unmodified code run on dinofast inside a `with` block.

    "faiss": `import faiss` gives `dinofast.drop_in.faiss`, whether faiss is installed or not, and
    `import faiss.contrib.torch_utils` finds nothing to do, as tensors go in anyway. "fastkmeans" gives the
    class `FastKMeans`, "flash_kmeans" the function `batch_kmeans_Euclid` alone. Code that has imported the
    real module before keeps it. Leaving the block brings everything back.

    Args:
        host: one of the names above.

    Yields:
        The module that does the work.

    Raises:
        InputError: another name.

    >>> with patch("faiss"):
    ...     import faiss
    ...     faiss.IndexFlatL2(3).is_trained
    True
    """
    if host not in REPLACED:
        raise InputError(f"cannot patch {host!r}; one of {', '.join(REPLACED)}")
    module = importlib.import_module(REPLACED[host])
    before = {name: m for name, m in sys.modules.items() if name == host or name.startswith(host + ".")}
    for name in before:
        del sys.modules[name]
    empty = {f"{host}.{name}": ModuleType(f"{host}.{name}") for name in PARTS.get(host, ())}
    sys.modules.update({host: module, **empty})
    try:
        yield module
    finally:
        for name in [n for n in sys.modules if n == host or n.startswith(host + ".")]:
            del sys.modules[name]
        sys.modules.update(before)
