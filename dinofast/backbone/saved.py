"""A backbone as a saved file describes it: how to load it again, and whether this one is it."""

from __future__ import annotations

import os
from typing import Any

import torch

from dinofast.errors import ArtifactError


def options(config: dict[str, Any]) -> dict[str, Any]:
    """Turn a backbone's `config` into what `dinofast.backbone.load` is asked for."""
    size = config["size"]
    return {
        "dtype": getattr(torch, config["dtype"]),
        "size": size if isinstance(size, int) else (size[0], size[1]),
        "layers": config["layers"],
        "position_resampling": config["position_resampling"],
        "resize": config["resize"],
    }


def check_same(path: str | os.PathLike[str], wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """Refuse a backbone whose weights or preprocessing differ from the fit's; names and precision may."""
    names = [
        n for n in sorted({*wanted, *found} - {"id", "license", "dtype"}) if wanted.get(n) != found.get(n)
    ]
    if names:
        listed = "; ".join(f"{n} {wanted.get(n)!r} in the file, {found.get(n)!r} here" for n in names)
        raise ArtifactError(
            f"{path}: was fitted with {wanted.get('id')}, and this backbone is not the same: {listed}. "
            "Load the backbone of the fit, or fit again."
        )
