"""Checkpoints of the published spatial autoregressive code, by their names and shapes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dinofast.errors import ArtifactError
from dinofast.models import foreign
from dinofast.models.raster_net import TAPS, Offset

STATE_KEY = "model_state_dict"
_NAME = re.compile(r"net\.(\d+)\.(weight|bias|mask)")


@dataclass(frozen=True)
class Published:
    """One network: its mode, the channels before its first layer and after each, its weights as ours."""

    mode: str
    widths: tuple[int, ...]
    weights: dict[str, Tensor]


def read(path: str | os.PathLike[str]) -> Published:
    """Read a checkpoint of the published code, without running code from it.

    Masks are multiplied in and masked taps left out. A layer without a mask has all nine taps.

    Raises:
        InputError: no such file, or it may not be read.
        ArtifactError: torn, not such a checkpoint, or of a network that `RasterNet` does not know.
    """
    path = Path(path)
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _tensors(path).items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise ArtifactError(
                f"{path}: holds {name!r}, which this network does not have; give a checkpoint of the dilated "
                "2-D autoregressive network."
            )
        layers.setdefault(int(match[1]), {})[match[2]] = tensor
    if not layers:
        raise ArtifactError(f"{path}: its {STATE_KEY} is empty.")
    seen: list[tuple[Offset, ...]] = []
    widths: list[int] = []
    weights = {}
    for i, number in enumerate(sorted(layers)):
        taps, kernel, bias = _layer(layers[number], f"{path}: net.{number}", widths[-1] if widths else None)
        seen.append(taps)
        widths += [kernel.shape[1]] * (not widths) + [kernel.shape[0]]
        weights[f"{i}.weight"] = torch.stack([kernel[:, :, dy + 1, dx + 1].T for dy, dx in taps])
        weights[f"{i}.bias"] = bias.clone()
    modes = [m for m, (first, rest) in TAPS.items() if seen == [first] + [rest] * (len(seen) - 1)]
    if not modes or widths[0] != widths[-1] or len(set(widths[1:-1])) > 1:
        raise ArtifactError(
            f"{path}: layers with {[len(taps) for taps in seen]} taps and channels {widths} are of no "
            f"network known here; modes are {', '.join(TAPS)}, with one number of hidden channels."
        )
    return Published(modes[0], tuple(widths), weights)


def _layer(
    found: dict[str, Tensor], label: str, width: int | None
) -> tuple[tuple[Offset, ...], Tensor, Tensor]:
    """Check one layer; gives its taps, its kernel (C_out, C_in, 3, 3) with the mask applied, and its bias."""
    if not {"weight", "bias"} <= found.keys():
        raise ArtifactError(f"{label} has {', '.join(sorted(found))}, but a layer has weight and bias.")
    kernel, bias = found["weight"].float(), found["bias"].float()
    mask = found.get("mask", torch.ones_like(kernel))
    shapes = [tuple(t.shape) for t in (kernel, bias, mask)]
    fits = kernel.dim() == 4 and shapes[0][2:] == (3, 3) and width in (None, shapes[0][1])
    if not fits or shapes[1] != shapes[0][:1] or shapes[2] != shapes[0]:
        raise ArtifactError(
            f"{label} has weight {shapes[0]}, bias {shapes[1]} and mask {shapes[2]}; 3 × 3 kernels are "
            f"known, with as many channels as the layer before gives{'' if width is None else f', {width}'}."
        )
    if 0 in shapes[0] or not torch.equal(mask, mask[:1, :1].expand(mask.shape).clamp(0, 1).round()):
        raise ArtifactError(f"{label}.mask is not one pattern of 0 and 1 for all channels.")
    if not bool(kernel.isfinite().all()) or not bool(bias.isfinite().all()):
        raise ArtifactError(f"{label} holds NaN or infinite values; that training failed.")
    taps = tuple((int(y) - 1, int(x) - 1) for y, x in mask[0, 0].nonzero().tolist())
    return taps, kernel * mask, bias


def _tensors(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a checkpoint file."""
    found = foreign.load(path)
    state = found.get(STATE_KEY) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ArtifactError(
            f"{path}: has no {STATE_KEY} with tensors; give a checkpoint of the published code."
        )
    return state
