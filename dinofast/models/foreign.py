"""Torch files that others wrote: read without running code, errors name the file."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from dinofast.errors import ArtifactError, InputError

_BROKEN = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    EOFError,
    OSError,
)
"""What torch.load raises for files that are torn or of another kind."""


def load(path: Path) -> Any:
    """Read a torch file of plain tensors onto the CPU.

    Raises:
        InputError: no such file, or it may not be read.
        ArtifactError: torn, or it holds more than tensors, containers and numbers.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; give a checkpoint of the "
            "published code, such as a .pth file."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise InputError(f"{path}: may not be read; check its permissions") from error
    except _BROKEN as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ArtifactError(
            f"{path}: torn, or not a torch file of plain tensors ({first}); fetch or save it again, and "
            "compare its size with the source."
        ) from error
