"""Hugging Face: hub names, the local cache, folders, and the transformers models made of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinofast.errors import BackboneError

_CLASSES = {
    "dinov2": ("Dinov2Config", "Dinov2Model"),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
    "dinov3_vit": ("DINOv3ViTConfig", "DINOv3ViTModel"),
}
_V2 = ("base", "small", "large", "giant")
NAMES = {
    **{f"dinov2-{size}": f"facebook/dinov2-{size}" for size in _V2},
    **{f"dinov2-with-registers-{size}": f"facebook/dinov2-with-registers-{size}" for size in _V2},
    **{
        f"dinov3-{size}": f"facebook/dinov3-{size}-pretrain-lvd1689m"
        for size in ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16")
    },
}
"""Short name -> hub id."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json"]
PROBE_SECONDS = 10
"""How long a hub may take to answer at all; the hub's own client waits for ever on a silent one."""

THREE_WAYS = (
    "Three ways to get weights: (1) a local path: pass the folder or the official .pth file, or set "
    "DINOFAST_BACKBONE to it; (2) a token: accept the license on the model's page and pass token=... or set "
    "HF_TOKEN; (3) a mirror: set HF_ENDPOINT to its address."
)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise BackboneError(
            "DINO backbones and text towers need the package transformers: pip install 'dinofast[hf]'"
        ) from error
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def assemble(model_type: str, config: dict[str, Any], tensors: dict[str, Tensor], source: str) -> Any:
    """Make a transformers model from a configuration and tensors under their hub names.

    Raises:
        BackboneError: transformers is not installed, or a tensor is missing, left over or of another shape.
    """
    transformers = _transformers()
    config_class, model_class = (getattr(transformers, name) for name in _CLASSES[model_type])
    return _load(transformers, model_class, source, None, config=config_class(**config), state_dict=tensors)


def from_folder(folder: Path) -> Any:
    """Load a folder as `save_pretrained` or the hub writes it.

    Raises:
        BackboneError: no or a torn config.json, another kind of model, missing or torn weights.
    """
    model_type = _model_type(folder, tuple(_CLASSES))
    transformers = _transformers()
    model_class = getattr(transformers, _CLASSES[model_type][1])
    return _load(transformers, model_class, str(folder), str(folder), local_files_only=True)


def text_tower(folder: Path) -> tuple[Any, Any]:
    """Load the text tower and the tokenizer of a CLIP model; what else the weights hold stays unread.

    Returns:
        (transformers' CLIPTextModelWithProjection, its tokenizer).

    Raises:
        BackboneError: no or a torn config.json, another kind of model, no tokenizer, missing or torn weights.
    """
    _model_type(folder, ("clip", "clip_text_model"))
    pair = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    if not pair and not (folder / "tokenizer.json").is_file():
        raise BackboneError(
            f"{folder}: holds no tokenizer; put vocab.json and merges.txt, or tokenizer.json, beside it"
        )
    transformers = _transformers()
    tower = transformers.CLIPTextModelWithProjection
    model = _load(transformers, tower, str(folder), str(folder), whole=False, local_files_only=True)
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a torn file ends in the bare Exception of a library in another language
        raise BackboneError(
            f"{folder}: its tokenizer cannot be read ({_first_line(error)}); fetch it again"
        ) from error
    return model, tokenizer


def _model_type(folder: Path, known: Sequence[str]) -> str:
    path = folder / "config.json"
    try:
        model_type = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneError(
            f"{folder}: no readable config.json with a model_type; give a folder of Hugging Face weights"
        ) from error
    if model_type not in known:
        raise BackboneError(
            f"{folder}: model_type is {model_type!r}; dinofast loads {', '.join(known)} here: give such a one"
        )
    return str(model_type)


def _load(
    transformers: Any, model_class: Any, source: str, *args: Any, whole: bool = True, **kwargs: Any
) -> Any:
    from safetensors import SafetensorError

    try:
        with _quiet(transformers):
            model, info = model_class.from_pretrained(
                *args, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True, **kwargs
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise BackboneError(
            f"{source}: weights are missing, torn or of another model ({_first_line(error)}); fetch them"
        ) from error
    missing = sorted(name for name in info["missing_keys"] if "mask_token" not in name)
    unknown = sorted(info["unexpected_keys"]) if whole else []
    wrong = missing + unknown + sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise BackboneError(
            f"{source}: {len(wrong)} tensors are missing, unknown or of another shape "
            f"({', '.join(wrong[:3])}); fetch the weights again"
        )
    return model.eval().requires_grad_(False)


def cached(repo: str, weights: Sequence[str] = _WEIGHTS, needed: Sequence[str] = ()) -> Path | None:
    """Return the folder of `repo` in the local Hugging Face cache, None where incomplete. Never connects.

    Args:
        repo: hub id.
        weights: file names, of which one must be there.
        needed: file names that must be there beside config.json.
    """
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    for file in weights:
        files = [try_to_load_from_cache(repo, name) for name in ("config.json", file, *needed)]
        if all(isinstance(found, str) for found in files):
            return Path(str(files[0])).parent
    return None


def from_hub(repo: str, token: str | None) -> Any:
    """Load `owner/name` from the local cache, or else from the hub.

    Raises:
        BackboneError: transformers is missing; the repository is gated, unknown or unreachable; or what
            came is not a DINO.
    """
    return from_folder(folder_of(repo, token, _FILES, _WEIGHTS))


def folder_of(
    repo: str, token: str | None, files: Sequence[str], weights: Sequence[str], needed: Sequence[str] = ()
) -> Path:
    """Find `owner/name` in the local cache, or else fetch it.

    Args:
        repo: hub id.
        token: of the hub; None takes HF_TOKEN.
        files: patterns of what is fetched; other weights than safetensors only where there are none.
        weights: see `cached`.
        needed: see `cached`.

    Raises:
        BackboneError: see `from_hub`.
    """
    _transformers()
    return cached(repo, weights, needed) or _download(repo, token, files)


def _download(repo: str, token: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # whichever HTTP client the hub uses, its own error is a base of the hub's
    failures: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, OSError, ValueError)
    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        info = HfApi(endpoint=endpoint, token=token).model_info(repo, timeout=PROBE_SECONDS)
        names = [file.rfilename for file in getattr(info, "siblings", None) or ()]
        wanted = [
            p
            for p in patterns
            if p != "pytorch_model.bin" or not any(n.endswith(".safetensors") for n in names)
        ]
        return Path(snapshot_download(repo, token=token, allow_patterns=wanted, endpoint=endpoint))
    except failures as error:
        raise BackboneError(f"{repo}: cannot be fetched ({_first_line(error)}). {THREE_WAYS}") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
