"""Models: features to anomaly maps. Names here, classes in their own files, loaded when first used."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dinofast.errors import ArtifactError, DinofastError, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from dinofast.models.base import Model

_CLASSES = {
    "dpmm": "dinofast.models.dpmm:DPMM",
    "memory_bank": "dinofast.models.memory_bank:MemoryBank",
    "patchcore": "dinofast.models.patchcore:PatchCore",
    "spatial_ar": "dinofast.models.spatial_ar:SpatialAR",
    "support_kmeans": "dinofast.models.support_kmeans:SupportKMeans",
    "zero_shot": "dinofast.models.zero_shot:ZeroShot",
}

__all__ = ["create", "load", "names", "restore"]


def names() -> list[str]:
    """List the model names that `create` knows, sorted."""
    return sorted(_CLASSES)


def create(name: str, **params: Any) -> Model:
    """Make an unfitted model by name.

    Args:
        name: one of `names()`.
        params: constructor arguments of the class; see its docstring.

    Raises:
        InputError: unknown name, unknown parameter, or a value that the class refuses.

    >>> create("memory_bank", n_neighbors=3)
    MemoryBank(n_neighbors=3)
    """
    if name not in _CLASSES:
        raise InputError(f"unknown model {name!r}; one of {', '.join(names())}")
    module, attribute = _CLASSES[name].split(":")
    cls: type[Model] = getattr(importlib.import_module(module), attribute)
    unknown = sorted(set(params) - set(cls.param_names()))
    if unknown:
        raise InputError(
            f"{name} has no parameter {', '.join(unknown)}; its parameters are {', '.join(cls.param_names())}"
        )
    return cls(**params)


def load(path: str | os.PathLike[str]) -> Model:
    """Load a model of any name, on the CPU, as `Model.save` wrote it.

    Raises:
        InputError: no such file, or it cannot be opened.
        ArtifactError: torn, foreign or newer, not a model, or its contents do not fit together.
    """
    from dinofast import artifact

    tensors, config = artifact.read(path, kind="model")
    try:
        return restore(config, tensors)
    except DinofastError as error:
        raise ArtifactError(f"{path}: {error}") from error


def restore(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Model:
    """Rebuild a fitted model from its `config()` and `state()`.

    Raises:
        InputError: unknown model name or parameter.
        ArtifactError: the two do not fit together.
    """
    name, params = config.get("model"), config.get("params")
    if not isinstance(name, str) or not isinstance(params, dict):
        raise ArtifactError("the configuration names no model and its parameters; save the model again.")
    model = create(name, **params)
    model.load_state(tensors)
    return model
