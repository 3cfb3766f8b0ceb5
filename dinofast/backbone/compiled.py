"""How a network is run: eagerly, by torch.compile, or as TensorRT engines that were held to its features."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinofast.errors import BackboneError

Call = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""Pixels and position table -> patch tokens and class tokens, as the networks' `forward`."""

OWN_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes of torch.compile that record CUDA graphs: the next result is written over the last."""

TENSORRT = "tensorrt"
TENSORRT_DEVICES = ("cuda",)
MODES = ("default", *OWN_GRAPHS, TENSORRT)
LEAST_COSINE = 0.999
"""Of every token of an engine with the same token of the network."""


def compiled(network: nn.Module, mode: str | None) -> Call:
    """Give what runs a network in one of `MODES`; None runs it as it is.

    Raises:
        BackboneError: "tensorrt", and torch_tensorrt is not installed.
    """
    if mode is None:
        return network
    if mode == TENSORRT:
        return Engines(network)
    return torch.compile(network, fullgraph=True, mode=mode)


class Engines:
    """TensorRT engines of a network, one for each shape, built when it first comes.

    An engine is used only after its features of a probe agree with the network's own.

    Args:
        network: from pixels and a position table to patch tokens and class tokens or None.

    Raises:
        BackboneError: torch_tensorrt is not installed, or one of its libraries is missing.
    """

    def __init__(self, network: nn.Module) -> None:
        try:
            self._tensorrt: Any = importlib.import_module("torch_tensorrt")
        except (ImportError, OSError) as error:  # a shared library may be missing behind it
            raise BackboneError(
                f"compile='tensorrt' needs torch_tensorrt ({error}): pip install 'dinofast[tensorrt]' on a "
                "machine with an NVIDIA GPU, or choose compile='default'."
            ) from error
        self._network = network
        self._engines: dict[Any, Call] = {}

    @torch.no_grad()
    def __call__(self, pixels: Tensor, position: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the engine of these shapes.

        Raises:
            BackboneError: it cannot be built, or its features do not agree with the network's; then the
                smallest cosine is named.
        """
        key = (pixels.shape, position.shape, pixels.dtype, pixels.device)
        if key not in self._engines:
            self._engines[key] = self._built(pixels, position)
        return self._engines[key](pixels, position)

    def _built(self, pixels: Tensor, position: Tensor) -> Call:
        given = probe(tuple(pixels.shape)).to(pixels.device, pixels.dtype)
        try:
            engine: Call = self._tensorrt.compile(
                self._network, ir="dynamo", arg_inputs=[given, position], use_explicit_typing=True
            )
        except Exception as error:  # whatever a compiler may raise
            raise BackboneError(
                f"TensorRT cannot build an engine for pixels {tuple(pixels.shape)} {pixels.dtype} "
                f"({type(error).__name__}: {error}); choose compile='default'."
            ) from error
        lowest = lowest_cosine(engine(given, position), self._network(given, position))
        if not lowest >= LEAST_COSINE:
            raise BackboneError(
                f"the TensorRT engine for pixels {tuple(pixels.shape)} {pixels.dtype} does not give the "
                f"network's features: the smallest cosine of a token is {lowest:.6f}, below {LEAST_COSINE}; "
                "it is not used. Choose compile='default', or dtype=torch.float32."
            )
        return engine


def probe(shape: tuple[int, ...]) -> Tensor:
    """Make pixels (B, 3, H, W), float32, on the CPU, as if normalized: waves, shifted by image, noise."""
    b, _, height, width = shape
    y, x = torch.arange(height) / 16, torch.arange(width) / 16
    phase = torch.arange(3.0)[:, None, None] + torch.arange(float(b))[:, None, None, None]
    waves = torch.sin(y[:, None] + phase) + torch.sin(1.7 * x + 0.5 * y[:, None] - phase)
    return waves + 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def lowest_cosine(found: tuple[Tensor, Tensor | None], truth: tuple[Tensor, Tensor | None]) -> float:
    """Compare tokens of two runs, one by one.

    Args:
        found: patch tokens (B, h, w, D) and class tokens (B, D) or None.
        truth: likewise.

    Returns:
        The lowest cosine of a token with the same token, in [-1, 1]; NaN where one holds NaN or infinity, and
        where a shape differs.
    """
    lowest = 1.0
    for ours, theirs in zip(found, truth, strict=True):
        if theirs is None and ours is None:
            continue
        if ours is None or theirs is None or ours.shape != theirs.shape:
            return math.nan
        cosine = F.cosine_similarity(ours.double(), theirs.double(), dim=-1)
        worst = float(cosine.min())
        if math.isnan(worst):
            return math.nan
        lowest = min(lowest, worst)
    return lowest
