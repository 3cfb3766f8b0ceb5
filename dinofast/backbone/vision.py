"""The transformers of DINOv2 and DINOv3 as one exportable module, with position tables made once a grid."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinofast.errors import InputError

PositionResampling = Literal["official", "transformers"]
KINDS = {"dinov2": "dinov2", "dinov2_with_registers": "dinov2-with-registers", "dinov3_vit": "dinov3"}
"""transformers' model_type -> the family's name here."""


class VisionTransformer(nn.Module):
    """Patch and class tokens of tapped blocks, from pixels and a position table.

    The blocks and norms are those of transformers' Dinov2Model, Dinov2WithRegistersModel or DINOv3ViTModel;
    blocks behind the last tap are dropped. The position table is an argument, so that a compiled or exported
    graph holds no resampling and no trigonometry.

    Args:
        model: one of the three transformers models, float32, on the CPU.
        layers: block indices to tap, 0-based, negative from the end; None is the last.
        position_resampling: see `resample_positions`; unused by DINOv3, which rotates instead.

    Raises:
        InputError: `layers` is empty or names a block that does not exist; an unknown `position_resampling`.

    References:
        Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, 2023.
        Darcet et al., Vision Transformers Need Registers, 2023.
        Siméoni et al., DINOv3, 2025.
    """

    def __init__(
        self, model: Any, layers: Sequence[int] | None, position_resampling: PositionResampling = "official"
    ) -> None:
        super().__init__()
        if position_resampling not in ("official", "transformers"):
            raise InputError(
                f"position_resampling={position_resampling!r}: choose 'official' or 'transformers'"
            )
        embeddings, depth = model.embeddings, model.config.num_hidden_layers
        self.kind = KINDS[model.config.model_type]
        self.layers = tapped(layers, depth)
        self.taps_last_block = self.layers == (depth - 1,)
        self.rotary = self.kind == "dinov3"
        self.position_resampling = None if self.rotary else position_resampling
        convolution: Any = next(m for m in embeddings.modules() if isinstance(m, nn.Conv2d))
        self.patch_size = int(convolution.kernel_size[0])
        self.dim = int(convolution.out_channels) * len(self.layers)
        # A matrix product, not the convolution: cuDNN would use TF32 for a float32 convolution.
        self.weight = nn.Parameter(convolution.weight.detach().flatten(1), requires_grad=False)
        self.bias = nn.Parameter(convolution.bias.detach(), requires_grad=False)
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
        self.blocks = nn.ModuleList(blocks[: max(self.layers) + 1])
        self.norm = model.norm if self.rotary else model.layernorm
        prefix = [embeddings.cls_token.detach()]
        if getattr(model.config, "num_register_tokens", 0):
            prefix.append(embeddings.register_tokens.detach())
        if self.rotary:
            self.position = _rotary(model.rope_embeddings, self.patch_size)
        else:
            table = embeddings.position_embeddings.detach().clone()
            prefix[0] = prefix[0] + table[:, :1]
            antialias = self.kind == "dinov2-with-registers"
            self.position = _resampled(table[:, 1:], antialias, position_resampling)
        self.prefix = nn.Parameter(torch.cat(prefix, 1), requires_grad=False)
        self.requires_grad_(False).eval()

    position: Callable[[int, int], Tensor]
    """(h, w) -> float32 table on the CPU: (N, D) to add; or cosine and sine (2, N, head dim) to rotate by."""

    def forward(self, pixels: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return patch tokens (B, h, w, D) and class tokens (B, D), in the dtype of the weights.

        Args:
            pixels: normalized (B, 3, H, W), H and W multiples of the patch size, in the dtype and on the
                device of the weights.
            position: what `position(h, w)` gave, likewise.
        """
        batch, channels, height, width = pixels.shape
        p, rows, columns = self.patch_size, height // self.patch_size, width // self.patch_size
        x = pixels.reshape(batch, channels, rows, p, columns, p)
        x = F.linear(x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1), self.weight, self.bias)
        arguments = {"position_embeddings": (position[0], position[1])} if self.rotary else {}
        x = x if self.rotary else x + position
        x = torch.cat((self.prefix.expand(batch, -1, -1), x), 1)
        taps: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            x = block(x, **arguments)
            if index in self.layers:
                taps[index] = self.norm(x)
        tokens = torch.cat([taps[index] for index in self.layers], -1)
        patches = tokens[:, self.prefix.shape[1] :].reshape(batch, rows, columns, self.dim)
        return patches, tokens[:, 0]


def tapped(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """Return block indices counted from 0, the last one for None.

    Raises:
        InputError: no index at all, one twice, or one outside the blocks.
    """
    asked = (depth - 1,) if layers is None else tuple(int(index) for index in layers)
    wrong = [index for index in asked if not -depth <= index < depth]
    found = tuple(index % depth for index in asked)
    if wrong or not asked or len(set(found)) < len(found):
        raise InputError(
            f"layers={list(asked)}: name different blocks, 0 to {depth - 1}, or negative from the end"
        )
    return found


def resample_positions(
    table: Tensor, rows: int, columns: int, antialias: bool, rule: PositionResampling
) -> Tensor:
    """Resample a square grid of position embeddings bicubically to another grid.

    Without antialias (DINOv2 without registers) the official code passes scale factors (rows + 0.1) / M and
    (columns + 0.1) / M, which shifts the sampling points; transformers passes the size. With antialias (with
    registers) both pass the size.

    Args:
        table: (1, M * M, D), float32.
        rows: patches down.
        columns: patches across.
        antialias: whether the family was trained with antialiased resampling.
        rule: whose rule to follow, "official" or "transformers".

    Returns:
        (rows * columns, D), row-major; the table itself where the grid is M x M.
    """
    side = math.isqrt(table.shape[1])
    if (rows, columns) == (side, side):
        return table[0]
    grid = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if rule == "official" and not antialias:
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        grid = F.interpolate(
            grid, size=(rows, columns), mode="bicubic", align_corners=False, antialias=antialias
        )
    return grid[0].flatten(1).T.contiguous()


def _resampled(table: Tensor, antialias: bool, rule: PositionResampling) -> Callable[[int, int], Tensor]:
    return lambda rows, columns: resample_positions(table, rows, columns, antialias, rule)


def _rotary(rope: Any, patch_size: int) -> Callable[[int, int], Tensor]:
    return lambda rows, columns: torch.stack(rope(torch.empty(1, 1, rows * patch_size, columns * patch_size)))


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Hash weights cheaply: sha256 over each tensor's shape and up to 257 of its values, evenly spaced.

    Tensors are taken in the order of their hashes, and without names: transformers renames modules between
    releases, and the same weights must keep their fingerprint.
    """
    parts = []
    for tensor in tensors:
        values = tensor.detach().flatten()
        sample = values[:: max(1, values.numel() // 256)][:257].float().cpu().contiguous()
        parts.append(hashlib.sha256(f"{tuple(tensor.shape)}".encode() + sample.numpy().tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()
