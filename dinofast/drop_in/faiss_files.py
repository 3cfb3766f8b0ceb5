"""faiss's file format, as far as flat indexes and id maps over them go: little-endian, no checksum."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinofast.errors import InputError
from dinofast.files import replacing

FLAT = {b"IxFI": 0, b"IxF2": 1}
"""First bytes of a flat index -> its metric."""
ID_MAP = b"IxMp"
HEADER = struct.Struct("<4siqqqBi")
"""Kind, D, rows, two unused, trained, metric."""
UNUSED = 1 << 20


def write(
    path: str | os.PathLike[str], rows: NDArray[np.float32], metric: int, ids: NDArray[np.int64] | None
) -> None:
    """Write rows (M, D), and their numbers (M,) for an id map; whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    kind = {metric: kind for kind, metric in FLAT.items()}[metric]
    (m, d), rest = rows.shape, (UNUSED, UNUSED, 1, metric)
    with replacing(path) as temporary, temporary.open("wb") as file:
        if ids is not None:
            file.write(HEADER.pack(ID_MAP, d, m, *rest))
        file.write(HEADER.pack(kind, d, m, *rest))
        file.write(struct.pack("<Q", rows.size))
        file.write(np.ascontiguousarray(rows, "<f4").data)
        if ids is not None:
            file.write(struct.pack("<Q", m))
            file.write(np.ascontiguousarray(ids, "<i8").data)


def read(path: str | os.PathLike[str]) -> tuple[NDArray[np.float32], int, NDArray[np.int64] | None]:
    """Give rows (M, D), metric, and numbers (M,) of an id map.

    Raises:
        InputError: no such file, torn, or another kind of index.
    """
    try:
        content = memoryview(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give an index file") from error
    try:
        kind, d, m, *_ = HEADER.unpack_from(content)
        mapped = kind == ID_MAP
        at = HEADER.size if mapped else 0
        kind, d, m, *_, metric = HEADER.unpack_from(content, at)
        if kind not in FLAT or FLAT[kind] != metric:
            raise InputError(f"{path}: holds a {kind!r}; flat indexes and id maps over them are offered")
        if d < 1 or m < 0:
            raise ValueError(f"{m} rows of {d} channels")
        rows, at = _vector(content, at + HEADER.size, "<f4", m * d)
        ids, at = _vector(content, at, "<i8", m) if mapped else (None, at)
        if at != len(content):
            raise InputError(f"{path}: {len(content) - at} bytes too long; copy it again")
        return rows.reshape(m, d).astype(np.float32), metric, ids
    except (struct.error, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: torn or no faiss index ({error}); copy it again") from error


def _vector(content: memoryview, at: int, dtype: str, size: int) -> tuple[NDArray[Any], int]:
    (found,) = struct.unpack_from("<Q", content, at)
    if found != size:
        raise ValueError(f"{found} numbers where {size} belong")
    values = np.frombuffer(content, dtype, size, at + 8)
    return values, at + 8 + values.nbytes
