"""Images to patch features: DINOv2, DINOv3 and EfficientNet-lite0 behind one call.

`load` finds the weights, `Backbone.preprocess` makes pixels of an image, and calling the backbone makes
`Features` of pixels. Compilation and precision are decided in this room and nowhere else.

>>> import numpy as np
>>> backbone = load("efficientnet-lite0", device="cpu")
>>> pixels = backbone.preprocess(np.zeros((300, 400, 3), np.uint8))
>>> backbone(pixels[None]).tensor.shape
torch.Size([1, 16, 21, 232])
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from dinofast.backbone import compiled, hub, official
from dinofast.backbone.compiled import MODES, TENSORRT
from dinofast.backbone.core import Backbone
from dinofast.backbone.efficientnet import EfficientNetLite0
from dinofast.backbone.preprocess import Preprocess, Size
from dinofast.backbone.vision import PositionResampling, VisionTransformer, fingerprint
from dinofast.errors import BackboneError, InputError

__all__ = ["Backbone", "Preprocess", "load"]

_log = logging.getLogger("dinofast")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a network may compute in."""
_DINOV3_LICENSE = "DINOv3 License (https://ai.meta.com/resources/models-and-libraries/dinov3-license)"


def load(
    name_or_path: str | os.PathLike[str] = "auto",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    compile: bool | str | None = None,
    size: Size | None = None,
    layers: Sequence[int] | None = None,
    position_resampling: PositionResampling = "official",
    token: str | None = None,
    resize: Literal["edge", "squash"] = "edge",
) -> Backbone:
    """Load a backbone.

    `name_or_path` is one of

    * "auto": the file or folder in DINOFAST_BACKBONE, else a DINOv2 in the local Hugging Face cache, else
      efficientnet-lite0; never connects;
    * a short name ("dinov2-small", "dinov2-with-registers-base", "dinov3-vits16", ...) or a hub id: from
      the local cache, else fetched;
    * a folder of Hugging Face weights;
    * an official .pth file of DINOv2 or DINOv3 (ViT-S, B, L), or a .safetensors of the same names;
    * "random:NAME" or "random:NAME:SEED": seeded weights of the true architecture, for benches and tests;
    * "efficientnet-lite0".

    Args:
        name_or_path: which weights, see above.
        device: "cpu", "cuda", ...; by default a GPU where there is one.
        dtype: float32, bfloat16 or float16, what the network computes in; features are float32 always. A
            lower one is held to float32 once, on a probe; `describe` tells the lowest cosine of a token.
        compile: None compiles on CUDA only; or True, False, "default", "reduce-overhead", "max-autotune"; or
            "tensorrt" (extra `tensorrt`), engines that must agree with the network, token by token.
        size: pixels of the smaller edge, or (H, W); None is 448, and 256 for efficientnet-lite0.
        layers: blocks whose outputs, each after the final norm, are concatenated along D; 0-based, negative
            from the end; None is the last block (for efficientnet-lite0 its stated taps).
        position_resampling: how DINOv2's position table meets another grid: "official" (the rule of the code
            that trained it, also for hub weights) or "transformers".
        token: of the hub, for gated weights; HF_TOKEN otherwise.
        resize: "edge" keeps the aspect, "squash" does not.

    Returns:
        A Backbone in eval mode, without gradients.

    Raises:
        BackboneError: weights missing, gated, unreachable, torn, or of another network; TensorRT is absent,
            or gives other features.
        InputError: an argument that cannot be used.
    """
    device = _device(device)
    mode = _compile_mode(compile, device)
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype}: choose torch.float32, torch.bfloat16 or torch.float16")
    source, reason = os.fspath(name_or_path), "asked for"
    if source == "auto":
        source, reason = _auto()
    network: VisionTransformer | EfficientNetLite0
    if source == EfficientNetLite0.kind:
        id, default_size = source, 256
        network = EfficientNetLite0(layers)
        weights = list(network.state_dict().values())
    else:
        (id, model), default_size = _model(source, token), 448
        network = VisionTransformer(model, layers, position_resampling)
        weights = [value for name, value in model.named_parameters() if "mask_token" not in name]
        if network.rotary:
            # rounded, because powers differ in their last bit between machines
            weights.append((model.rope_embeddings.inv_freq * 1e5).round())
    license = _license(id, network.kind)
    if license == _DINOV3_LICENSE:
        _log.warning("%s: weights under the %s; they may not be passed on without its terms", id, license)
    backbone = Backbone(
        network,
        Preprocess(default_size if size is None else size, network.patch_size, resize),
        id=id,
        source=source,
        reason=reason,
        license=license,
        fingerprint=fingerprint(weights),
        compile=mode,
    ).to(device)
    if dtype != torch.float32:
        backbone.lower(dtype)
    if mode == TENSORRT:
        side = backbone.preprocess.cropped_size(network.patch_size, network.patch_size)
        backbone(torch.zeros(1, 3, *side))  # builds an engine and judges it
    _log.info("backbone %s", backbone.describe())
    return backbone


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={device!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return found


def _compile_mode(compile: bool | str | None, device: torch.device) -> str | None:
    if compile is None:
        compile = device.type == "cuda"
    if isinstance(compile, bool):
        return "default" if compile else None
    if compile not in MODES:
        raise InputError(f"compile={compile!r}: choose True, False, None or one of {', '.join(MODES)}")
    if compile == TENSORRT and device.type not in compiled.TENSORRT_DEVICES:
        raise InputError(
            f"compile='tensorrt' needs an NVIDIA GPU, and the device is {device}; choose device='cuda' on a "
            "machine with one, or compile='default'."
        )
    return compile


def _auto() -> tuple[str, str]:
    named = os.environ.get("DINOFAST_BACKBONE")
    if named:
        return named, "auto: DINOFAST_BACKBONE names it"
    if importlib.util.find_spec("transformers") is None:
        return EfficientNetLite0.kind, "auto: transformers is not installed"
    for name, repo in hub.NAMES.items():
        if name.startswith("dinov2-") and hub.cached(repo):
            return name, "auto: found in the local Hugging Face cache"
    return EfficientNetLite0.kind, "auto: no DINOv2 on this machine"


def _model(source: str, token: str | None) -> tuple[str, Any]:
    """Return (id, transformers model) of anything but efficientnet-lite0."""
    if source.startswith("random:"):
        name, _, seed = source.removeprefix("random:").partition(":")
        if name not in official.ARCHITECTURES or not (seed or "0").isdigit():
            known = ", ".join(official.ARCHITECTURES)
            raise BackboneError(f"{source}: give random:NAME or random:NAME:SEED with NAME one of {known}")
        id = f"random:{name}:{int(seed or 0)}"
        tensors = official.random_tensors(official.ARCHITECTURES[name], int(seed or 0))
        return id, official.build(tensors, id)
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve().name, hub.from_folder(path)
    if path.is_file():
        return path.name, official.build(official.read(path), str(path))
    if path.suffix in (".pth", ".pt", ".bin", ".safetensors") or source.startswith(("/", ".", "~")):
        raise BackboneError(f"{source}: no such file or folder. {hub.THREE_WAYS}")
    repo = hub.NAMES.get(source, source)
    if repo.count("/") != 1:
        known = ", ".join([*hub.NAMES, EfficientNetLite0.kind, "auto"])
        raise BackboneError(
            f"{source!r}: no such backbone; give a path, a hub id OWNER/NAME, or one of {known}"
        )
    return repo, hub.from_hub(repo, token)


def _license(id: str, kind: str) -> str:
    if id.startswith("random:"):
        return "none (random weights)"
    return _DINOV3_LICENSE if kind == "dinov3" else "Apache-2.0"
