"""AD-DINOv3 in float64 NumPy, and what toy models learn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from dinofast.models.zero_shot import ZeroShot
from dinofast.text_vectors import TextVectors
from dinofast.types import Features

TAPS, WIDTH, CHANNELS, SIZE = 2, 4, 3, (7, 9)
ADAPTERS = {"patch_token_adapter": "patch_adapter", "cls_token_adapter": "cls_adapter"}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(width: int = WIDTH, names: tuple[str, ...] = ("lung", "object"), tower: str = "0") -> TextVectors:
    pairs = {name: F.normalize(random(2, width, seed=i + 40), dim=1) for i, name in enumerate(names)}
    return TextVectors(pairs, tower * 64, "a toy")


def images(
    b: int = 3, seed: int = 0, grid: tuple[int, int] = (3, 4), size: tuple[int, int] = SIZE, **changes: Any
) -> Features:
    """Images with a rectangle of truth in all but the last."""
    masks = torch.zeros(b, *size, dtype=torch.bool)
    for i in range(b - 1):
        masks[i, i : i + 3, 2 : 4 + i] = True
    tensor = random(b, *grid, TAPS * CHANNELS, seed=seed) * 2 + 1
    found = {"tensor": tensor, "cls": random(b, TAPS * CHANNELS, seed=seed + 1), "image_size": size}
    return Features(**found | {"masks": masks} | changes)


def fitted(text_file: str, **params: Any) -> ZeroShot:
    few = {"n_taps": TAPS, "n_epochs": 2, "learning_rate": 0.01}
    return ZeroShot(**{"text": text_file} | few | params).fit([images()])


# A second derivation


def leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.01 * x)


def enlarged(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear with aligned corners, by one-dimensional interpolation of rows, then of columns."""
    h, w = grid.shape
    tall = np.stack([np.interp(np.linspace(0, h - 1, size[0]), np.arange(h), c) for c in grid.T], 1)
    return np.stack([np.interp(np.linspace(0, w - 1, size[1]), np.arange(w), r) for r in tall])


class Truth:
    """One image: maps and logits, tap by tap, with both channels of every softmax."""

    def __init__(self, weights, tokens, cls, pair, size, interleaved=False):
        h, w, _ = tokens.shape
        taps, _, d = weights["patch_adapter"].shape
        rows = tokens.reshape(h * w, -1)
        rows = (rows - rows.mean(0)) / (rows.std(0, ddof=1) + 1e-6)
        normal, abnormal = (leaky(weights["text_adapter"][i] @ pair[i]) for i in range(2))
        columns = (normal, abnormal)
        if interleaved:  # even positions of both, then odd positions of both
            columns = tuple(np.concatenate([normal[i::2], abnormal[i::2]]) for i in range(2))
        self.normal, self.map, self.aware, self.logits = 0, 0, 0, 0
        self.patches = 0
        for tap in range(taps):
            part = slice(tap * d, (tap + 1) * d)
            p = leaky(rows[:, part] @ weights["patch_adapter"][tap].T)
            p /= np.linalg.norm(p, axis=1, keepdims=True)
            q = leaky(weights["cls_adapter"][tap] @ cls[part])
            q /= np.linalg.norm(q)
            coarse = [(100 * p @ column).reshape(h, w) for column in columns]
            fine = np.exp([enlarged(channel, size) for channel in coarse])
            self.normal, self.map = (
                total + channel / taps
                for total, channel in zip((self.normal, self.map), fine / fine.sum(0), strict=True)
            )
            self.patches += np.exp(coarse[1]) / np.exp(coarse).sum(0) / taps
            self.aware += 1 / (1 + np.exp(-enlarged((10 * p @ q).reshape(h, w), size))) / taps
            self.logits += np.array([100 * q @ column for column in columns]) / taps

    def losses(self, mask):
        hot = np.clip(np.stack([~mask, mask]).astype(float), 1e-5, 1 - 1e-5)

        def both(normal, abnormal):
            pt = hot[0] * normal + hot[1] * abnormal + 1e-5
            overlap = (2 * abnormal[mask].sum() + 1) / (abnormal.sum() + mask.sum() + 1)
            return np.mean(-((1 - pt) ** 2) * np.log(pt)) + 1 - overlap

        entropy = np.log(np.exp(self.logits).sum()) - self.logits[int(mask.any())]
        return np.array([both(1 - self.aware, self.aware), both(self.normal, self.map), entropy])


def doubles(tensors):
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def truths(weights, features, pairs, interleaved=False):
    return [
        Truth(weights, tokens, cls, pair, features.image_size, interleaved)
        for tokens, cls, pair in zip(
            features.tensor.double().numpy(), features.cls.double().numpy(), pairs, strict=True
        )
    ]
