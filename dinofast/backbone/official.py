"""Official facebookresearch weight files: what stands in them, and how transformers' modules take it."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dinofast.backbone.hub import assemble
from dinofast.errors import BackboneError

HEAD_DIM = 64
UNUSED = ("mask_token",)
"""Tensors that a file may hold or lack: inference does not read them."""

_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
_HUB = {
    "dinov2": {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "register_tokens": "embeddings.register_tokens",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
        "blocks": "encoder.layer",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "qkv": "attention.attention.query attention.attention.key attention.attention.value",
        **_BLOCK,
    },
    "dinov3": {
        "cls_token": "embeddings.cls_token",
        "storage_tokens": "embeddings.register_tokens",
        "patch_embed.proj": "embeddings.patch_embeddings",
        "norm": "norm",
        "blocks": "layer",
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
        "qkv": "attention.q_proj attention.k_proj attention.v_proj",
        **_BLOCK,
    },
}
"""Official module name -> name in the files on the Hugging Face hub, which transformers keeps reading."""


@dataclass(frozen=True)
class Architecture:
    """One DINO vision transformer: all that decides the names and shapes of its tensors.

    Attributes:
        family: "dinov2" or "dinov3".
        dim: channels D; heads have 64.
        depth: blocks.
        registers: register (storage) tokens.
        patch: patch size in pixels.
        side: patches along an edge of the stored position grid; 0 for DINOv3.
    """

    family: Literal["dinov2", "dinov3"]
    dim: int
    depth: int
    registers: int
    patch: int
    side: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor of the official file: name -> shape, in the file's order."""
        d = self.dim
        out: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, d)}
        if self.family == "dinov2":
            out["pos_embed"] = (1, 1 + self.side**2, d)
            if self.registers:
                out["register_tokens"] = (1, self.registers, d)
        else:
            out["storage_tokens"] = (1, self.registers, d)
            out["rope_embed.periods"] = (HEAD_DIM // 4,)
        out |= {"mask_token": (1, d), "patch_embed.proj.weight": (d, 3, self.patch, self.patch)}
        out["patch_embed.proj.bias"] = (d,)
        for index in range(self.depth):
            b = f"blocks.{index}."
            out |= {b + "norm1.weight": (d,), b + "norm1.bias": (d,)}
            out |= {b + "attn.qkv.weight": (3 * d, d), b + "attn.qkv.bias": (3 * d,)}
            if self.family == "dinov3":
                out[b + "attn.qkv.bias_mask"] = (3 * d,)
            out |= {b + "attn.proj.weight": (d, d), b + "attn.proj.bias": (d,), b + "ls1.gamma": (d,)}
            out |= {b + "norm2.weight": (d,), b + "norm2.bias": (d,)}
            out |= {b + "mlp.fc1.weight": (4 * d, d), b + "mlp.fc1.bias": (4 * d,)}
            out |= {b + "mlp.fc2.weight": (d, 4 * d), b + "mlp.fc2.bias": (d,), b + "ls2.gamma": (d,)}
        return out | {"norm.weight": (d,), "norm.bias": (d,)}


_SIZES = {"small": (384, 12), "base": (768, 12), "large": (1024, 24)}
ARCHITECTURES = {
    **{f"dinov2-{n}": Architecture("dinov2", d, k, 0, 14, 37) for n, (d, k) in _SIZES.items()},
    **{f"dinov2-with-registers-{n}": Architecture("dinov2", d, k, 4, 14, 37) for n, (d, k) in _SIZES.items()},
    **{f"dinov3-vit{n[0]}16": Architecture("dinov3", d, k, 4, 16, 0) for n, (d, k) in _SIZES.items()},
}


def read(path: Path) -> dict[str, Tensor]:
    """Read a weight file, `.safetensors` or a torch state dict, without running code from it.

    Raises:
        BackboneError: torn, unreadable, or not a dictionary of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,
        ValueError,
        OSError,
        EOFError,
    ) as e:
        raise BackboneError(
            f"{path}: torn, or not a weight file ({str(e).splitlines()[0] if str(e) else type(e).__name__}); "
            "fetch it again and compare its size with the source"
        ) from e
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise BackboneError(f"{path}: not a plain dictionary of tensors; give the backbone's own state dict")
    return tensors


def recognize(tensors: dict[str, Tensor], source: str) -> Architecture:
    """Tell from names and shapes which DINO these tensors are; the depth is what the file holds.

    Raises:
        BackboneError: not a DINOv2 or DINOv3 ViT with a GELU MLP, tensors missing, of another shape, unknown,
            or not finite.
    """
    if any(".mlp.w12." in name or ".mlp.w1." in name for name in tensors):
        raise BackboneError(
            f"{source}: a SwiGLU network (ViT-g, ViT-H+); official files are read for ViT-S, B and L: "
            "load this one by its hub name or hub folder"
        )
    try:
        dim, _, patch, _ = tensors["patch_embed.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        if "storage_tokens" in tensors or "rope_embed.periods" in tensors:
            found = Architecture("dinov3", dim, depth, tensors["storage_tokens"].shape[1], patch, 0)
        else:
            registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
            side = round((tensors["pos_embed"].shape[1] - 1) ** 0.5)
            found = Architecture("dinov2", dim, depth, registers, patch, side)
    except (KeyError, ValueError, IndexError) as error:
        some = ", ".join(list(tensors)[:3]) or "nothing"
        raise BackboneError(
            f"{source}: not an official DINOv2 or DINOv3 file (holds {some}, ...); "
            "give one of those, or a hub folder"
        ) from error
    expected = found.shapes()
    problems = [f"{name} is missing" for name in expected if name not in tensors and name not in UNUSED]
    problems += [f"{name} is unknown" for name in tensors if name not in expected]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems += [f"{n} is not finite" for n, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if problems or dim % HEAD_DIM:
        raise BackboneError(
            f"{source}: looks like {found.family}, but {'; '.join(problems[:3] or ['its width is unknown'])}"
            f"{f' and {len(problems) - 3} more' if len(problems) > 3 else ''}; fetch the official file again"
        )
    return found


def build(tensors: dict[str, Tensor], source: str) -> Any:
    """Make transformers' model of official tensors, on the CPU, float32.

    DINOv3's key bias is masked as the file says, and its rotary periods are those of the file.

    Raises:
        BackboneError: see `recognize`; or transformers is not installed.
    """
    a = recognize(tensors, source)
    hub: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in UNUSED and not name.endswith("bias_mask") and name != "rope_embed.periods":
            value = tensor.float()
            if name.endswith("qkv.bias") and f"{name}_mask" in tensors:
                value = value * tensors[f"{name}_mask"].float()
            hub |= dict(
                zip(_renamed(name, a.family), value.chunk(3) if ".qkv." in name else (value,), strict=True)
            )
    common = {
        "hidden_size": a.dim,
        "num_hidden_layers": a.depth,
        "num_attention_heads": a.dim // HEAD_DIM,
        "patch_size": a.patch,
    }
    if a.family == "dinov3":
        keys = [name for name in hub if name.endswith("k_proj.bias")]
        biased = any(bool(hub[name].any()) for name in keys)
        hub = hub if biased else {name: value for name, value in hub.items() if name not in keys}
        model = assemble(
            "dinov3_vit",
            {
                **common,
                "intermediate_size": 4 * a.dim,
                "num_register_tokens": a.registers,
                "key_bias": biased,
            },
            hub,
            source,
        )
        model.rope_embeddings.inv_freq.copy_(1 / tensors["rope_embed.periods"].float())
        return model
    common["image_size"] = a.side * a.patch
    if a.registers:
        return assemble("dinov2_with_registers", {**common, "num_register_tokens": a.registers}, hub, source)
    return assemble("dinov2", common, hub, source)


def _renamed(name: str, family: str) -> list[str]:
    names = _HUB[family]
    if not name.startswith("blocks."):
        module = next(m for m in names if name == m or name.startswith(m + "."))
        return [names[module] + name[len(module) :]]
    _, index, rest = name.split(".", 2)
    head = f"{names['blocks']}.{index}."
    if rest.startswith("attn.qkv."):
        return [f"{head}{module}.{rest.rsplit('.', 1)[1]}" for module in names["qkv"].split()]
    module = next(m for m in names if rest == m or rest.startswith(m + "."))
    return [head + names[module] + rest[len(module) :]]


def random_tensors(architecture: Architecture, seed: int) -> dict[str, Tensor]:
    """Draw weights of an official file from a seed; the global random state is left alone.

    Scales are such that tokens depend on their patch and on each other: projections keep variance,
    LayerScale is about one half.
    """
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    for name, shape in architecture.shapes().items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("periods"):
            noise = 100.0 ** torch.linspace(0, 1, shape[0] + 1)[:-1]
        elif name.endswith("bias_mask"):
            noise = torch.ones(shape)
            noise[shape[0] // 3 : 2 * shape[0] // 3] = 0
        elif name.endswith("gamma"):
            noise.mul_(0.1).add_(0.5)
        elif "norm" in name and name.endswith("weight"):
            noise.mul_(0.1).add_(1)
        elif name.endswith("weight"):
            noise.mul_((noise[0].numel()) ** -0.5)
        else:
            noise.mul_(0.1 if name.endswith("bias") else 0.5)
        out[name] = noise
    return out
