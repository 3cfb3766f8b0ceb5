"""The sizes that matter, by name; README.md tells where each comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

D = 384
"""Channels of a ViT-S."""


def unit_rows(rows: int, seed: int, d: int = D) -> Tensor:
    """Draw (rows, d) float32 rows of norm 1: directions without preference, as hard as a search gets."""
    drawn = torch.randn(rows, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn)


def _features_and_rows(n: int, k: int) -> tuple[Tensor, Tensor]:
    return unit_rows(n, 0), unit_rows(k, 1)


def _mixture(n: int, k: int) -> tuple[Any, ...]:
    """Give features near the means of a diagonal mixture, whose parts touch."""
    generator = torch.Generator().manual_seed(2)
    means, spread = unit_rows(k, 1), 0.5 + torch.rand(k, D, generator=generator)
    owner = torch.randint(k, (n,), generator=generator)
    noise = torch.randn(n, D, generator=generator) * (spread[owner] / D).sqrt()
    weights = torch.rand(k, generator=generator).log_softmax(0)
    return means[owner] + noise, means, D / spread, weights, "diag"


def _patch_maps(images: int) -> tuple[Any, ...]:
    map = torch.rand(images, 32, 32, generator=torch.Generator().manual_seed(3))
    return map, [448, 448], 4.0, "bilinear", "reflect"


SHAPES: dict[str, dict[str, Callable[[], tuple[Any, ...]]]] = {
    "cosine_max": {
        "image_1024x150": lambda: _features_and_rows(1024, 150),
        "batch_12288x150": lambda: _features_and_rows(12_288, 150),
        "bank_1024x100000": lambda: _features_and_rows(1024, 100_000),
    },
    "knn_topk": {"bank_1024x10000_k3": lambda: (*_features_and_rows(1024, 10_000), 3, "cosine")},
    "dpm_stats": {"image_1024x150_diag": lambda: _mixture(1024, 150)},
    "upsample_blur": {"image_32_to_448": lambda: _patch_maps(1)},
}
"""Operator -> name of a size -> what makes the operator's arguments, the same at every call."""
