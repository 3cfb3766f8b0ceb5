"""The one file format: safetensors with one metadata key `dinofast` of sorted JSON; never pickle.

One key only, because safetensors writes several metadata keys in random order: with one, the same content
gives the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dinofast import __version__
from dinofast.errors import ArtifactError, InputError
from dinofast.files import replacing

SCHEMA_VERSION = 1
"""Raised by one whenever an older package could misread what this one writes."""

_KEY = "dinofast"


def write(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Write tensors and their configuration to one file, whole or not at all.

    The same arguments give the same bytes. Tensors are written from where they lie when they are contiguous
    and on the CPU; others are copied
    first, as are those that share memory with one before.

    Args:
        path: file to make or replace.
        kind: what the file holds, such as "model" or "detector"; `read` asks for it.
        tensors: name -> tensor, any shape, dtype and device; NaN is kept.
        config: name -> JSON value; no NaN or infinity.

    Raises:
        InputError: the file cannot be written (what stood there stays), or `config` is not JSON.

    >>> import tempfile, torch
    >>> path = Path(tempfile.mkdtemp()) / "a.safetensors"
    >>> write(path, "model", {"bank": torch.ones(2, 3)}, {"n_neighbors": 1})
    >>> tensors, config = read(path, kind="model")
    >>> tensors["bank"].shape, config
    (torch.Size([2, 3]), {'n_neighbors': 1})
    """
    header = {
        "config": dict(config),
        "dinofast_version": __version__,
        "kind": kind,
        "schema_version": SCHEMA_VERSION,
    }
    try:
        text = json.dumps(header, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path}: the configuration of this {kind} is not JSON ({error}); nothing was written. "
            "Use numbers, strings, booleans, None, lists and dictionaries with string keys."
        ) from error
    ready: dict[str, Tensor] = {}
    memories: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        ready[name] = plain.clone() if memory in memories else plain
        memories.add(memory)
    with replacing(path) as temporary:
        try:
            save_file(ready, temporary, metadata={_KEY: text})
        except SafetensorError as error:
            raise InputError(
                f"{path}: cannot be written ({error}); nothing was changed there. "
                "Choose a folder that is writable and has space."
            ) from error


def read(
    path: str | os.PathLike[str], kind: str | None, *, mapped: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` wrote.

    Args:
        path: file to read.
        kind: what it must hold; None takes any.
        mapped: leave the tensors in the file, read as they are looked at; it must stay as it is meanwhile.

    Returns:
        tensors: name -> tensor on the CPU, in memory of its own: the file may change or vanish afterwards.
            Not so where `mapped`.
        config: the configuration given to `write`.

    Raises:
        InputError: there is no such file, or it cannot be opened.
        ArtifactError: the file is torn, was not written by dinofast, was written by a newer one, or holds
            another kind.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}; give the path of a {kind or 'file'} saved by dinofast.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = _header(path, file.metadata(), kind)
            # get_tensor maps the file: without the copy, overwriting it in place would change a loaded model
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            tensors = found if mapped else {name: tensor.clone() for name, tensor in found.items()}
    except SafetensorError as error:
        raise ArtifactError(
            f"{path}: torn or not a dinofast file ({error}). Save or copy it again; "
            f"a dinofast {kind or 'file'} is a complete safetensors file."
        ) from error
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); check its permissions."
        ) from error
    return tensors, header["config"]


def _header(path: Path, metadata: Mapping[str, str] | None, kind: str | None) -> dict[str, Any]:
    """Parse the metadata and hold it to this package's schema and the wanted kind."""
    foreign = (
        f"{path}: a safetensors file, but not one of dinofast's; give a {kind or 'file'} that dinofast saved."
    )
    try:
        header = json.loads((metadata or {})[_KEY])
        schema, writer, found = header["schema_version"], header["dinofast_version"], header["kind"]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(foreign) from error
    if not isinstance(schema, int):
        raise ArtifactError(foreign)
    if schema > SCHEMA_VERSION:
        raise ArtifactError(
            f"{path}: written by dinofast {writer} in format {schema}; this is dinofast {__version__}, which "
            f"reads formats up to {SCHEMA_VERSION}. Upgrade dinofast."
        )
    if kind is not None and found != kind:
        raise ArtifactError(f"{path}: holds a {found}, not a {kind}; load it as a {found}.")
    if not isinstance(header.get("config"), dict):
        raise ArtifactError(foreign)
    return dict(header)
