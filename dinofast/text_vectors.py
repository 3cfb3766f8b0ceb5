"""What a text tower says of classes: two vectors each, small enough to be passed on without the tower."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dinofast import artifact
from dinofast.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self


@dataclass(frozen=True)
class TextVectors:
    """Text vectors of classes, made by one tower; `dinofast.backbone.text` makes them.

    Attributes:
        vectors: class name -> (2, D), float32, rows of unit length: the normal states, the abnormal states.
        tower: sha256 over the tower's weights, 64 hexadecimal digits. Vectors of two towers do not mix.
        source: what the tower was called when it was loaded.

    Raises:
        InputError: on construction: no classes, a name without a letter, another shape or dtype, NaN or
            infinite values, rows that are not of unit length, D that differs, or no sha256.

    >>> vectors = TextVectors({"brain": torch.eye(2, 8)}, "0" * 64, "a tower")
    >>> vectors.names, vectors.dim
    (['brain'], 8)
    """

    vectors: Mapping[str, Tensor]
    tower: str
    source: str

    def __post_init__(self) -> None:
        if not self.vectors:
            raise InputError("text vectors of no class at all; name at least one")
        for name, pair in self.vectors.items():
            check_class_name(name)
            if pair.dim() != 2 or pair.shape[0] != 2 or pair.dtype != torch.float32 or 0 in pair.shape:
                raise InputError(
                    f"text vectors of {name!r} must be float32 (2, D), got {pair.dtype} {tuple(pair.shape)}"
                )
            if not bool((pair.norm(dim=1) - 1).abs().max() < 1e-3):
                raise InputError(
                    f"text vectors of {name!r} are not of unit length, but {pair.norm(dim=1).tolist()}"
                )
        dims = sorted({pair.shape[1] for pair in self.vectors.values()})
        if len(dims) > 1:
            raise InputError(f"text vectors of several D, {dims}; use one tower for all classes")
        if len(self.tower) != 64 or not set(self.tower) <= set("0123456789abcdef"):
            raise InputError(f"tower={self.tower!r}: not a sha256 in hexadecimal digits")

    @property
    def names(self) -> list[str]:
        """The classes, in order."""
        return list(self.vectors)

    @property
    def dim(self) -> int:
        """D of the vectors."""
        return int(next(iter(self.vectors.values())).shape[1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file of 8 · D bytes a class; the same vectors give the same bytes.

        Raises:
            InputError: the file cannot be written.
        """
        artifact.write(path, "text", self.vectors, {"source": self.source, "tower": self.tower})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote, onto the CPU, classes sorted by name.

        Raises:
            InputError: no such file, or it cannot be opened.
            ArtifactError: torn, foreign or newer, not text vectors, or its contents do not fit together.
        """
        tensors, config = artifact.read(path, kind="text")
        try:
            return cls({n: tensors[n] for n in sorted(tensors)}, str(config["tower"]), str(config["source"]))
        except (InputError, KeyError) as error:
            raise ArtifactError(f"{path}: does not hold together ({error}); make it again.") from error


def check_class_name(name: object) -> None:
    """Refuse a class name that gives no sentence.

    Raises:
        InputError: not a string, no letter or digit in it, or space around it.
    """
    if not isinstance(name, str) or not any(map(str.isalnum, name)) or name != name.strip():
        raise InputError(f"class name {name!r}: give a noun for what the images show, such as 'brain'")
