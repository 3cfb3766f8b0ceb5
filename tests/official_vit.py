"""DINO's official files with random values, and a second derivation of their forward passes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dinofast.backbone import official

KEYS = Path(__file__).parent / "keys"
FAMILIES = {
    "dinov2": ("dinov2_vits14", "dinov2-small"),
    "dinov2-with-registers": ("dinov2_vits14_reg4", "dinov2-with-registers-small"),
    "dinov3": ("dinov3_vits16", "dinov3-vits16"),
}
LISTS = {
    "dinov2_vits14": "dinov2-small",
    "dinov2_vitb14": "dinov2-base",
    "dinov2_vitl14": "dinov2-large",
    "dinov2_vits14_reg4": "dinov2-with-registers-small",
    "dinov3_vits16": "dinov3-vits16",
    "dinov3_vitb16": "dinov3-vitb16",
    "dinov3_vitl16": "dinov3-vitl16",
}


def listed(name: str) -> dict[str, tuple[int, ...]]:
    tensors = json.loads((KEYS / f"{name}.json").read_text())["tensors"]
    return {key: tuple(shape) for key, shape in tensors.items()}


def checkpoint(name: str, depth: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """An official file of the listed names and shapes, its first blocks only, with random values."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, shape in listed(name).items():
        if key.startswith("blocks.") and int(key.split(".")[1]) >= depth:
            continue
        value = torch.randn(shape, generator=generator)
        if key.endswith("bias_mask"):
            value = torch.ones(shape)
            value[shape[0] // 3 : 2 * shape[0] // 3] = 0
        elif key.endswith("periods"):
            # not the formula's values: what stands in the file must decide
            value = 90 ** (torch.arange(shape[0]) / shape[0])
        elif key.endswith("gamma"):
            value = 0.3 + 0.2 * value
        elif "norm" in key:
            value = 0.2 * value + (1 if key.endswith("weight") else 0)
        elif key.endswith("weight"):
            value = value / math.prod(shape[1:]) ** 0.5
        out[key] = value
    return out


def bicubic(x: float) -> list[float]:
    """Weights of the four neighbors at offset x in [0, 1), Keys' kernel with a = -0.75."""

    def near(t: float) -> float:
        return (1.25 * t - 2.25) * t * t + 1

    def far(t: float) -> float:
        return ((-0.75 * t + 3.75) * t - 6) * t + 3

    return [far(1 + x), near(x), near(1 - x), far(2 - x)]


def resampling_matrix(old: int, new: int, scale: float) -> Tensor:
    """(new, old): bicubic without antialias, half-pixel centers, border repeated, in float64."""
    out = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        source = (i + 0.5) / scale - 0.5
        base = math.floor(source)
        for k, weight in enumerate(bicubic(source - base)):
            out[i, min(max(base - 1 + k, 0), old - 1)] += weight
    return out


def official_positions(tensors: dict[str, Tensor], h: int, w: int) -> Tensor:
    """(1 + h * w, D) by the rule of the official modules."""
    table = tensors["pos_embed"][0]
    if (h, w) == (37, 37):
        return table
    grid = table[1:].reshape(37, 37, -1)
    if "register_tokens" in tensors:
        moved = F.interpolate(
            grid.permute(2, 0, 1)[None], size=(h, w), mode="bicubic", align_corners=False, antialias=True
        )[0].permute(1, 2, 0)
    else:
        rows = resampling_matrix(37, h, (h + 0.1) / 37)
        columns = resampling_matrix(37, w, (w + 0.1) / 37)
        moved = torch.einsum("ij,jkd,lk->ild", rows, grid.double(), columns).float()
    return torch.cat((table[:1], moved.reshape(h * w, -1)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def official_forward(tensors: dict[str, Tensor], pixels: Tensor, taps: tuple[int, ...] = (-1,)) -> Tensor:
    """Every token (B, 1 + R + N, D) of the tapped blocks along D, by the published forward pass."""
    t, third = tensors, "storage_tokens" in tensors
    patch, dim = t["patch_embed.proj.weight"].shape[-1], t["cls_token"].shape[-1]
    heads, batch = dim // 64, len(pixels)
    h, w = pixels.shape[2] // patch, pixels.shape[3] // patch
    x = F.conv2d(pixels, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=patch)
    x = torch.cat((t["cls_token"].expand(batch, -1, -1), x.flatten(2).transpose(1, 2)), 1)
    extra = t.get("storage_tokens", t.get("register_tokens"))
    if not third:
        x = x + official_positions(t, h, w)
    if extra is not None:
        x = torch.cat((x[:, :1], extra.expand(batch, -1, -1), x[:, 1:]), 1)
    prefix = x.shape[1] - h * w
    if third:
        y = (torch.arange(h) + 0.5) / h * 2 - 1
        z = (torch.arange(w) + 0.5) / w * 2 - 1
        at = torch.stack((y[:, None].expand(h, w), z[None].expand(h, w)), -1).reshape(h * w, 2, 1)
        angle = (2 * math.pi * at / t["rope_embed.periods"]).reshape(h * w, 32).repeat(1, 2)
        cos, sin = angle.cos(), angle.sin()
    depth = 1 + max(int(key.split(".")[1]) for key in t if key.startswith("blocks."))
    eps, tapped = (1e-5 if third else 1e-6), []

    def norm(value: Tensor, name: str) -> Tensor:
        return F.layer_norm(value, (dim,), t[name + ".weight"], t[name + ".bias"], eps)

    def linear(value: Tensor, name: str, mask: Tensor | None = None) -> Tensor:
        bias = t[name + ".bias"]
        return F.linear(value, t[name + ".weight"], bias if mask is None else bias * mask)

    for i in range(depth):
        b = f"blocks.{i}."
        qkv = linear(norm(x, b + "norm1"), b + "attn.qkv", t.get(b + "attn.qkv.bias_mask"))
        q, k, v = (part.reshape(batch, -1, heads, 64).transpose(1, 2) for part in qkv.split(dim, -1))
        if third:
            q, k = (torch.cat((s[:, :, :prefix], rotate(s[:, :, prefix:], cos, sin)), 2) for s in (q, k))
        seen = (q @ k.transpose(-1, -2) / 8).softmax(-1) @ v
        seen = linear(seen.transpose(1, 2).reshape(batch, -1, dim), b + "attn.proj")
        x = x + seen * t[b + "ls1.gamma"]
        hidden = F.gelu(linear(norm(x, b + "norm2"), b + "mlp.fc1"))
        x = x + linear(hidden, b + "mlp.fc2") * t[b + "ls2.gamma"]
        tapped.append(norm(x, "norm"))
    return torch.cat([tapped[i] for i in taps], -1)


def shallow(monkeypatch: pytest.MonkeyPatch, name: str, depth: int = 2) -> str:
    """Make random:NAME a network of few blocks."""
    small = dataclasses.replace(official.ARCHITECTURES[name], depth=depth)
    monkeypatch.setitem(official.ARCHITECTURES, name, small)
    return f"random:{name}"
