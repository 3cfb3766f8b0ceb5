"""A convolutional network that predicts each patch from others of its map, by its active taps alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

Offset = tuple[int, int]

_ALL = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
_BEFORE = tuple(tap for tap in _ALL if tap < (0, 0))
TAPS = {
    "causal": (_BEFORE, (*_BEFORE, (0, 0))),
    "bidirectional": (tuple(tap for tap in _ALL if tap != (0, 0)), _ALL),
    "standard": (_ALL, _ALL),
}
"""Mode -> the taps (row, column) of a 3 × 3 kernel that are not masked: of the first layer, of the others."""

SMALL_PRODUCT = 1 << 27
"""Up to as many multiplications a tap is one product with a copy before and after, beyond one in place for
each row of the map. The many small ones are a little faster alone, but every product wakes all threads, and
where other programs keep the cores busy they wait several times longer."""

LOSSES = ("mse", "cosine")
INITS = ("full", "active")


@dataclass(frozen=True)
class RasterNet:
    """The layers of one network; what they learn is a dictionary of tensors, "i.weight" and "i.bias".

    A weight is (T, C_in, C_out): one matrix for each of the T taps that are not masked. No product with a
    masked tap, or with the zeros beyond the border, is ever computed.

    Attributes:
        mode: one of `TAPS`.
        dilations: of each layer.
        widths: channels before the first layer and after each.
        sign: 1, or −1 to look the other way: the same as running on the map turned by 180°.
    """

    mode: str
    dilations: tuple[int, ...]
    widths: tuple[int, ...]
    sign: int = 1

    def offsets(self, layer: int) -> list[Offset]:
        """List the patches that a layer sees, relative to the one that it computes."""
        step = self.sign * self.dilations[layer]
        return [(step * dy, step * dx) for dy, dx in TAPS[self.mode][layer > 0]]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name every tensor that is learned, with its shape."""
        found: dict[str, tuple[int, ...]] = {}
        for i in range(len(self.dilations)):
            found[f"{i}.weight"] = (len(TAPS[self.mode][i > 0]), *self.widths[i : i + 2])
            found[f"{i}.bias"] = self.widths[i + 1 : i + 2]
        return found

    def draw(self, init: str, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw weights and biases, uniform in ±1/√fan-in, on the CPU.

        Args:
            init: "full" counts all nine taps into the fan-in, "active" those that are not masked.
            generator: of the CPU.
        """
        found = {}
        for name, shape in self.shapes().items():
            layer = int(name.split(".")[0])
            taps = 9 if init == "full" else len(self.offsets(layer))
            bound = 1 / math.sqrt(taps * self.widths[layer])
            found[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return found

    def errors(
        self,
        weights: Mapping[str, Tensor],
        source: Tensor,
        target: Tensor,
        loss: str,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Predict every patch of `source` and compare with `target`.

        Args:
            weights: as `draw` gives them.
            source: (B, h, w, C), float32; B at least 1.
            target: like `source`.
            loss: "mse": mean over the channels of the squared difference; "cosine": 1 − cosine, 1 where one
                of the two is zero.
            dropout: probability with which a hidden value is zeroed; the others grow by 1 / (1 − dropout).
            generator: of the CPU, for the dropout.

        Returns:
            (B, h, w); differentiable in the weights.
        """
        grid = math.gcd(*self.dilations, *source.shape[1:3])
        y: Tensor = _split(source, grid)
        last = len(self.dilations) - 1
        for i in range(len(self.dilations)):
            offsets = [(dy // grid, dx // grid) for dy, dx in self.offsets(i)]
            y = _TapConv.apply(  # type: ignore[no-untyped-call]
                y, weights[f"{i}.weight"], weights[f"{i}.bias"], offsets
            )
            if i < last:
                y = y.relu_()
                if dropout > 0:
                    kept = torch.rand(y.shape, generator=generator).ge_(dropout).to(y.device)
                    y = y * kept.div_(1 - dropout)
        wanted = _split(target, grid)
        if loss == "mse":
            return _join((y - wanted).square().mean(dim=3), grid, len(source))
        return _join(1 - cosine_similarity(y, wanted, dim=3), grid, len(source))


def _split(x: Tensor, grid: int) -> Tensor:
    """Turn (B, h, w, C) into (h / grid, w / grid, B · grid², C), contiguous.

    Where all offsets are multiples of `grid`, the sub-grids know nothing of each other; with them innermost,
    a tap reads and writes long contiguous blocks.
    """
    b, h, w, c = x.shape
    parted = x.view(b, h // grid, grid, w // grid, grid, c).permute(1, 3, 0, 2, 4, 5)
    return parted.reshape(h // grid, w // grid, b * grid * grid, c).contiguous()


def _join(scores: Tensor, grid: int, b: int) -> Tensor:
    """Turn (h / grid, w / grid, B · grid²) back into (B, h, w)."""
    rows, columns = scores.shape[:2]
    parted = scores.view(rows, columns, b, grid, grid).permute(2, 0, 3, 1, 4)
    return parted.reshape(b, rows * grid, columns * grid)


class _TapConv(torch.autograd.Function):
    """x (h, w, B, C_in), weight (T, C_in, C_out), bias (C_out), offsets -> (h, w, B, C_out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, offsets: Sequence[Offset]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.offsets = offsets
        out = bias.expand(*x.shape[:3], -1).contiguous()
        _add_products(out, x, weight, offsets)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = x.new_zeros(x.shape)
            _add_products(to_x, grad, weight.transpose(1, 2), [(-dy, -dx) for dy, dx in ctx.offsets])
        pairs = [_blocks(x, grad, offset) for offset in ctx.offsets]
        to_weight = torch.stack([torch.bmm(seen.mT, wanted).sum(dim=0) for seen, wanted in pairs])
        return to_x, to_weight, grad.sum(dim=(0, 1, 2)), None


def _add_products(out: Tensor, x: Tensor, weight: Tensor, offsets: Sequence[Offset]) -> None:
    """Add to each place of `out` the products of what `x` holds at the offsets from it, where that exists."""
    for matrix, offset in zip(weight, offsets, strict=True):
        seen, wanted = _blocks(x, out, offset)
        if seen.numel() * matrix.shape[1] < SMALL_PRODUCT:
            wanted += (seen.flatten(0, 1) @ matrix).view(wanted.shape)
        else:
            wanted.baddbmm_(seen, matrix.expand(len(seen), *matrix.shape))


def _blocks(x: Tensor, out: Tensor, offset: Offset) -> tuple[Tensor, Tensor]:
    """Pair what is read with where it goes: views (n, rows, C) of `x` and `out`, n as small as can be."""
    (y_in, y_out), (x_in, x_out) = (_shifted(n, s) for n, s in zip(x.shape, offset, strict=False))
    seen, wanted = x[y_in, x_in].flatten(1, 2), out[y_out, x_out].flatten(1, 2)
    if offset[1] == 0:
        return seen.flatten(0, 1)[None], wanted.flatten(0, 1)[None]
    return seen, wanted


def _shifted(n: int, step: int) -> tuple[slice, slice]:
    """Give the places 0 to n − 1 whose neighbor at `step` exists: that neighbor, and the place itself."""
    low, high = min(max(-step, 0), n), max(n - max(step, 0), 0)
    return slice(low + step, high + step) if low < high else slice(0, 0), slice(low, max(low, high))
