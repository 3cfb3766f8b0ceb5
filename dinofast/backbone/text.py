"""Class names to text vectors: sentences on normal and abnormal states through a CLIP text tower.

>>> len(sentences("brain")[0]), len(sentences("brain")[1])
(245, 175)
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dinofast.backbone import hub
from dinofast.backbone.vision import fingerprint
from dinofast.errors import BackboneError, InputError
from dinofast.text_vectors import TextVectors, check_class_name

NORMAL = (
    "{}",
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damage",
)
ABNORMAL = ("damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage")
_QUALIFIERS = (
    "bad",
    "low resolution",
    "cropped",
    "bright",
    "dark",
    "close-up",
    "black and white",
    "jpeg corrupted",
    "blurry",
    "good",
)
TEMPLATES = (
    *(f"a {qualifier} photo of {article} {{}}." for qualifier in _QUALIFIERS for article in ("a", "the")),
    *(f"a photo of {article} {{}}." for article in ("a", "the", "my", "one")),
    *(
        f"a photo of {article} {size} {{}}."
        for size in ("cool", "large", "small")
        for article in ("a", "the")
    ),
    *(f"there is {article} {{}} in the scene." for article in ("a", "the")),
    *(f"this is {article} {{}} in the scene." for article in ("a", "the", "one")),
)
"""The 35 sentences into which each state goes."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_TOKENS = ("vocab.json", "merges.txt")
_FILES = ["config.json", "tokenizer*", "special_tokens_map.json", *_TOKENS, *_WEIGHTS, "*.safetensors"]
_AT_ONCE = 64


def sentences(name: str) -> tuple[list[str], list[str]]:
    """Write the 245 sentences on a normal and the 175 on an abnormal object of a class.

    Raises:
        InputError: a name without a letter, or with space around it.
    """
    check_class_name(name)
    normal, abnormal = (
        [template.format(state.format(name)) for state in states for template in TEMPLATES]
        for states in (NORMAL, ABNORMAL)
    )
    return normal, abnormal


class TextTower:
    """A frozen CLIP text tower with its tokenizer; float32. `load` makes one.

    Attributes:
        source: what `load` was given.
        dim: D of its vectors.
        fingerprint: sha256 over its weights.
    """

    def __init__(self, model: Any, tokenizer: Any, source: str, device: str | torch.device = "cpu") -> None:
        self.source, self.dim = source, int(model.config.projection_dim)
        self.fingerprint = fingerprint(model.parameters())
        self._model, self._tokenizer = model.eval().requires_grad_(False).to(device), tokenizer
        self._longest = int(model.config.max_position_embeddings)
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """Embed sentences: the projected feature at the end of the text.

        Args:
            texts: sentences.

        Returns:
            (number of texts, D), float32, rows of unit length, on the CPU.

        Raises:
            InputError: a sentence of more tokens than the tower reads.
        """
        found = []
        for start in range(0, len(texts), _AT_ONCE):
            part = texts[start : start + _AT_ONCE]
            tokens = self._tokenizer(part, padding=True, return_tensors="pt")
            if tokens["input_ids"].shape[1] > self._longest:
                longest = max(part, key=len)
                raise InputError(
                    f"{longest!r}: {tokens['input_ids'].shape[1]} tokens, and {self.source} reads "
                    f"{self._longest}; choose a shorter class name"
                )
            features = self._model(**tokens.to(self._model.device)).text_embeds
            found.append(F.normalize(features.float(), dim=-1).cpu())
        return torch.cat(found)

    def vectors(self, names: Iterable[str]) -> TextVectors:
        """Average the sentences of each class: a unit vector for its normal and one for its abnormal states.

        A class is embedded once in the life of the tower object.

        Args:
            names: classes, such as ["brain", "liver"].

        Raises:
            InputError: no names, a name without a letter, or one that is too long.
        """
        if isinstance(names, str):
            raise InputError(f"expected a list of class names, got one; pass [{names!r}]")
        wanted = list(dict.fromkeys(names))
        for name in wanted:
            if name not in self._known:
                means = [self.embed(texts).mean(dim=0) for texts in sentences(name)]
                self._known[name] = F.normalize(torch.stack(means), dim=-1)
        return TextVectors({name: self._known[name] for name in wanted}, self.fingerprint, self.source)


def load(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    token: str | None = None,
) -> TextTower:
    """Load the text tower of a CLIP model; its image tower, where there is one, stays unread.

    Args:
        name_or_path: a folder of Hugging Face weights with their tokenizer, or a hub id OWNER/NAME such as
            "openai/clip-vit-large-patch14-336", the tower of the published AD-DINOv3 adapters: from the
            local cache, else fetched.
        device: where it runs; vectors come back on the CPU.
        token: of the hub, for gated weights; HF_TOKEN otherwise.

    Raises:
        BackboneError: transformers is missing; no such folder or repository; weights or tokenizer missing,
            torn or of another kind of model.

    References:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.
    """
    source, path = os.fspath(name_or_path), Path(name_or_path).expanduser()
    if path.is_dir():
        folder = path
    elif source.count("/") == 1 and not source.startswith((".", "~", "/")):
        folder = hub.folder_of(source, token, _FILES, _WEIGHTS, _TOKENS)
    else:
        raise BackboneError(
            f"{source}: no such folder; give a folder of a CLIP model with its tokenizer, or a hub id such "
            "as openai/clip-vit-large-patch14-336"
        )
    model, tokenizer = hub.text_tower(folder)
    return TextTower(model, tokenizer, source, device)
