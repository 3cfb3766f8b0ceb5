"""The one module that callers hold: pixels to Features, compiled or not, in any precision."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn

from dinofast.backbone.compiled import OWN_GRAPHS, Call, compiled, lowest_cosine, probe
from dinofast.backbone.efficientnet import EfficientNetLite0
from dinofast.backbone.preprocess import Preprocess
from dinofast.backbone.vision import VisionTransformer
from dinofast.errors import InputError
from dinofast.types import Features

_LOG = logging.getLogger("dinofast")


class Backbone(nn.Module):
    """A frozen network from normalized pixels to patch features; made by `dinofast.backbone.load`.

    Attributes:
        preprocess: image -> pixels (3, H, W), float32.
        id: hub id, file or folder name, `random:...` or `efficientnet-lite0`.
        kind: "dinov2", "dinov2-with-registers", "dinov3" or "efficientnet-lite0".
        source: what `load` was given, after "auto" was decided.
        reason: why this one runs.
        license: license of the weights.
        fingerprint: hash of the float32 weights.
        patch_size: pixels along an edge of one patch.
        dim: channels D of the features.
        layers: tapped blocks.
        taps_last_block: whether these are the network's last block alone.
        has_cls: whether features come with class tokens.
        compile_mode: how it is compiled, one of `dinofast.backbone.compiled.MODES`; None when it is not.
        lowest_cosine: of a token in this precision with the same in float32, on a probe; None where nothing
            was lowered. NaN where tokens overflow.
    """

    _call: Call

    def __init__(
        self,
        network: VisionTransformer | EfficientNetLite0,
        preprocess: Preprocess,
        *,
        id: str,
        source: str,
        reason: str,
        license: str,
        fingerprint: str,
        compile: str | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.preprocess = preprocess
        self.id, self.source, self.reason = id, source, reason
        self.license, self.fingerprint = license, fingerprint
        self.kind, self.patch_size, self.dim = network.kind, network.patch_size, network.dim
        self.layers, self.taps_last_block = network.layers, network.taps_last_block
        self.has_cls = isinstance(network, VisionTransformer)
        self.compile_mode = compile
        self._positions: dict[tuple[int, int], Tensor] = {}
        self.lowest_cosine: float | None = None
        call = compiled(network, compile)
        object.__setattr__(self, "_call", call)  # a second submodule would list every weight twice
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in; features are float32 whatever it is."""
        return next(self.network.parameters()).dtype

    @property
    def config(self) -> dict[str, Any]:
        """Everything that decides features, ready for JSON; two equal configs give equal features."""
        return {
            **self.preprocess.config,
            "id": self.id,
            "kind": self.kind,
            "layers": list(self.layers),
            "position_resampling": self.network.position_resampling,
            "dtype": _name(self.dtype),
            "license": self.license,
            "fingerprint": self.fingerprint,
        }

    def describe(self) -> str:
        """Return one line: which network, at what size, where, under which license, and why."""
        how = f"compiled ({self.compile_mode})" if self.compile_mode else "eager"
        if self.lowest_cosine is not None:
            how += f", lowest token cosine to float32 {self.lowest_cosine:.6f}"
        return (
            f"{self.id}: {self.kind}, size {self.preprocess.size} ({self.preprocess.resize}), "
            f"patch {self.patch_size}, D {self.dim}, {_name(self.dtype)} on {self.device}, {how}, "
            f"license {self.license}; {self.reason}"
        )

    def __repr__(self) -> str:
        return f"Backbone({self.describe()})"

    def position(self, height: int, width: int) -> Tensor:
        """Return the position table of images of (height, width) pixels; made once a grid and kept.

        Raises:
            InputError: a side is no positive multiple of the patch size.
        """
        p = self.patch_size
        if min(height, width) < p or height % p or width % p:
            raise InputError(
                f"{height}x{width} pixels: both sides must be multiples of the patch size {p}; "
                "use backbone.preprocess"
            )
        grid = (height // p, width // p)
        table = self._positions.get(grid)
        if table is None or table.device != self.device or table.dtype != self.dtype:
            with torch.no_grad():
                table = self.network.position(*grid).to(self.device, self.dtype)
            self._positions[grid] = table
        return table

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Features:
        """Return features of a batch.

        Args:
            pixels: normalized (B, 3, H, W), floating, any device; H and W multiples of the patch size.

        Returns:
            Features with `tensor` (B, h, w, D) and `cls` (B, D), None for EfficientNet, both float32 on the
            device of the weights, and `image_size` (H, W). A pixel that is NaN makes its image's features NaN
            (for EfficientNet, those around it).

        Raises:
            InputError: another shape, not floating, or sides that are no multiples of the patch size.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise InputError(
                f"pixels are {tuple(pixels.shape)} {pixels.dtype}; give normalized floating (B, 3, H, W), "
                "which backbone.preprocess makes of any image"
            )
        height, width = int(pixels.shape[2]), int(pixels.shape[3])
        position = self.position(height, width)
        patches, cls = self._call(pixels.to(self.device, self.dtype), position)
        # A captured CUDA graph writes its next result over this one.
        copied = self.compile_mode in OWN_GRAPHS
        patches = patches.to(torch.float32, copy=copied)
        return Features(patches, None if cls is None else cls.to(torch.float32, copy=copied), (height, width))

    def export_module(self, height: int | None = None, width: int | None = None) -> nn.Module:
        """Return a plain module for torch.export: pixels (B, 3, H, W) -> patches (B, h, w, D), cls (B, D).

        Inputs and outputs are in the dtype of the weights, which it shares; the position table is a buffer of
        it, so the graph holds it as a constant. EfficientNet's cls is None.

        Args:
            height: H; by default what `preprocess` makes of a square image.
            width: W, likewise.

        Raises:
            InputError: sides that are no multiples of the patch size.
        """
        square = self.preprocess.cropped_size(self.patch_size, self.patch_size)
        return _Exportable(self.network, self.position(height or square[0], width or square[1]))

    @torch.no_grad()
    def lower(self, dtype: torch.dtype) -> None:
        """Let a float32 network compute in bfloat16 or float16, and see what that does to its tokens.

        The probe is a square of at most 224 pixels a side. A cosine below 0.99 is a warning.
        """
        side = max(self.patch_size, min(224, *self.preprocess.cropped_size(self.patch_size, self.patch_size)))
        side -= side % self.patch_size
        pixels = probe((1, 3, side, side)).to(self.device)
        truth = self.network(pixels, self.position(side, side))
        self.to(dtype)
        found = self.network(pixels.to(dtype), self.position(side, side))
        self.lowest_cosine = lowest_cosine(found, truth)
        if not self.lowest_cosine >= 0.99:
            _LOG.warning(
                "%s in %s: the lowest cosine of a token to float32 is %.6f; use bfloat16 or float32",
                self.id, _name(dtype), self.lowest_cosine,
            )  # fmt: skip

    @torch.no_grad()
    def precision_report(self, pixels: Tensor) -> dict[str, float]:
        """Return the lowest cosine between a patch token in bfloat16 or float16 and the same in float32.

        Args:
            pixels: normalized (B, 3, H, W).

        Returns:
            {"bfloat16": lowest cosine, "float16": lowest cosine}, each in [-1, 1]; 1 is no difference, NaN
            where tokens overflow.

        Raises:
            InputError: this backbone does not compute in float32, so there is no truth to compare with.
        """
        if self.dtype != torch.float32:
            raise InputError(
                f"this backbone computes in {_name(self.dtype)}; load it with dtype=torch.float32 to compare"
            )
        truth = self(pixels)
        lowest = {}
        for dtype in (torch.bfloat16, torch.float16):
            network = copy.deepcopy(self.network).to(dtype)
            position = self.position(*pixels.shape[2:]).to(dtype)
            tokens, _ = network(pixels.to(self.device, dtype), position)
            lowest[_name(dtype)] = lowest_cosine((tokens, None), (truth.tensor, None))
        return lowest


class _Exportable(nn.Module):
    position: Tensor

    def __init__(self, network: nn.Module, position: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("position", position)

    def forward(self, pixels: Tensor) -> Any:
        return self.network(pixels, self.position)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
