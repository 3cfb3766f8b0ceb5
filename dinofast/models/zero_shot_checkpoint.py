"""Adapters of the published AD-DINOv3 code: a torch file of three state dicts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinofast.errors import ArtifactError
from dinofast.models import foreign

PARTS = {
    "patch_token_adapter": "patch_adapter",
    "cls_token_adapter": "cls_adapter",
    "prompt_adapter": "text_adapter",
}
"""Name of a state dict in the file -> the name of its weights here."""

_USED, _UNUSED = "fc1", "fc2"
_NAME = re.compile(r"(\d+)\.(fc1|fc2)\.0\.weight")


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the adapters of a published checkpoint; no code in the file is run.

    Its second layers (fc2), which take part in no result of the published code, are checked and left out.

    Args:
        path: file such as `<epoch>.pth`.

    Returns:
        patch_adapter (L, E, d), cls_adapter (L, E, d) and text_adapter (2, E, E), float32, on the CPU.

    Raises:
        InputError: no such file, or it may not be read.
        ArtifactError: torn; not three such state dicts; tensors missing, unknown, of shapes that do not
            belong together, not floating or not finite.
    """
    found = foreign.load(Path(path))
    if not isinstance(found, Mapping) or set(found) != set(PARTS):
        names = ", ".join(sorted(map(str, found))) if isinstance(found, Mapping) else type(found).__name__
        raise ArtifactError(
            f"{path}: not a checkpoint of AD-DINOv3's adapters, which holds {', '.join(sorted(PARTS))}; "
            f"this holds {names}"
        )
    state = {ours: _stacked(path, part, found[part]) for part, ours in PARTS.items()}
    taps, width, _ = state["patch_adapter"].shape
    if state["cls_adapter"].shape != state["patch_adapter"].shape:
        raise ArtifactError(
            f"{path}: patch and class-token adapters differ, {tuple(state['patch_adapter'].shape)} and "
            f"{tuple(state['cls_adapter'].shape)} (taps, out, in); the file is not of one training."
        )
    if state["text_adapter"].shape != (2, width, width):
        raise ArtifactError(
            f"{path}: prompt_adapter is {tuple(state['text_adapter'].shape)} (states, out, in); for {taps} "
            f"taps of width {width} it must be {(2, width, width)}."
        )
    return state


def _stacked(path: str | os.PathLike[str], part: str, tensors: Any) -> Tensor:
    """Stack the first layers of one state dict, (number, out, in), when all of it is as it should be."""
    if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ArtifactError(f"{path}: {part} is not a dictionary of tensors; give the published file.")
    parsed = {name: _NAME.fullmatch(str(name)) for name in tensors}
    unknown = sorted(str(name) for name, match in parsed.items() if match is None)
    count = len({match[1] for match in parsed.values() if match})
    wanted = [f"{i}.{layer}.0.weight" for layer in (_USED, _UNUSED) for i in range(max(count, 1))]
    missing = [name for name in wanted if name not in tensors]
    if unknown or missing:
        raise ArtifactError(
            f"{path}: {part} lacks {', '.join(missing) or 'nothing'}; unknown in it: "
            f"{', '.join(unknown) or 'nothing'}; give adapters of the published code, whole."
        )
    shape = tensors[wanted[0]].shape
    for name in wanted:
        tensor = tensors[name]
        right = shape if _USED in name else shape[::-1]
        if tensor.dim() != 2 or tensor.shape != right:
            raise ArtifactError(
                f"{path}: {part} {name} is {tuple(tensor.shape)}, beside {wanted[0]} {tuple(shape)} it must "
                f"be {tuple(right)}."
            )
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ArtifactError(
                f"{path}: {part} {name} holds NaN, infinite or whole numbers; fetch it again."
            )
    return torch.stack([tensors[name] for name in wanted[:count]]).float()
