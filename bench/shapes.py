"""The sizes that matter, by name; README.md tells where each comes from."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from dinofast import Detector, backbone
from dinofast.data import demo, rider
from dinofast.data.fetch import cache

D = 384
"""Channels of a ViT-S."""


def unit_rows(rows: int, seed: int, d: int = D) -> Tensor:
    """Draw (rows, d) float32 rows of norm 1: directions without preference, as hard as a search gets."""
    drawn = torch.randn(rows, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn)


def clustered_rows(rows: int, clusters: int, seed: int, noise: float = 0.5, d: int = D) -> Tensor:
    """Draw (rows, d) float32 rows of norm 1 around centers that depend on their number alone."""
    centers = torch.randn(clusters, d, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + seed)
    owner = torch.randint(clusters, (rows,), generator=generator)
    drawn = torch.randn(rows, d, generator=generator).mul_(noise).add_(centers[owner])
    return torch.nn.functional.normalize(drawn)


@lru_cache(maxsize=2)
def real_rows(name: str, queries: int) -> tuple[Tensor, Tensor]:
    """Compute features of a demo set by efficientnet-lite0: (queries, 232) of slices with a lesion, (M, 232).

    The bank of "brain" is that of the demo; that of "lung-ct" has all slices without tumor.
    """
    detector = Detector(backbone.load("efficientnet-lite0", device="cpu"))
    data = demo.load(name)
    normal = data.fit if name == "brain" else [s for s in data.volume.samples() if s.label == 0]
    bank = detector.fit(normal).model.state()["bank"]
    lesions = detector.fit(data.test[:: max(1, len(data.test) // 7)]).model.state()["bank"]
    return lesions[:: len(lesions) // queries][:queries].contiguous(), bank


REAL = {"bank_real_brain": "brain", "bank_real_lung-ct": "lung-ct"}
"""Size -> the demo set whose features it has."""


def missing(op: str, size: str) -> str:
    """Tell why an operator cannot run at a size here, or nothing."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    if memory < (needed := SLOW.get((op, size), 0)):
        return f"needs {needed} GiB of memory, there are {memory}"
    if (
        REAL.get(size) == "lung-ct"
        and not (cache() / f"lung-ct-{rider.ARCHIVE.sha256[:12]}" / "image.nii.gz").exists()
    ):
        return "the lung CT is not in the cache; `dinofast demo` fetches it"
    if size in REAL and not importlib.util.find_spec("nibabel"):
        return "needs nibabel"
    return ""


def _features_and_rows(n: int, k: int) -> tuple[Tensor, Tensor]:
    return unit_rows(n, 0), unit_rows(k, 1)


def _clustered_pair(n: int, k: int) -> tuple[Tensor, Tensor]:
    return clustered_rows(n, 400, 0), clustered_rows(k, 400, 1)


def _mixture(n: int, k: int) -> tuple[Any, ...]:
    """Give features near the means of a diagonal mixture, whose parts touch."""
    generator = torch.Generator().manual_seed(2)
    means, spread = unit_rows(k, 1), 0.5 + torch.rand(k, D, generator=generator)
    owner = torch.randint(k, (n,), generator=generator)
    noise = torch.randn(n, D, generator=generator) * (spread[owner] / D).sqrt()
    weights = torch.rand(k, generator=generator).log_softmax(0)
    return means[owner] + noise, means, D / spread, weights, "diag"


def _clusters(n: int, k: int, covariance_type: str) -> tuple[Any, ...]:
    """Give unit rows in clusters, as features are, and the mixture that EM finds in them.

    The noise of a cluster has half its power in 32 directions, and uneven channels. A cluster has about 25
    rows here, so its variance is drawn to that of all, as it would be by itself with hundreds of rows.
    """
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    owner = torch.randint(k, (n,), generator=generator)
    noise = (draw(n, D) + draw(n, 32) @ draw(32, D) / 32**0.5) * (0.5 * draw(D)).exp()
    x = unit_rows(k, 1)[owner] + 0.8 * noise / noise.norm(dim=1).mean()
    x = torch.nn.functional.normalize(x)
    count = torch.bincount(owner, minlength=k) + 1e-3
    means = torch.zeros(k, D).index_add_(0, owner, x) / count[:, None]
    centered = x - means[owner]
    if covariance_type == "diag":
        own = torch.zeros(k, D).index_add_(0, owner, centered.square()) / count[:, None]
        precisions = 1 / (0.7 * own + 0.3 * own.mean(0) + 1e-6)
    else:
        shared = 0.3 * centered.T @ centered / n + 1e-3 * torch.eye(D)
        parts = [centered[owner == i] for i in range(k)]
        own = torch.stack([shared + 0.7 * part.T @ part / max(1, len(part)) for part in parts])
        precisions = torch.cholesky_inverse(torch.linalg.cholesky(own.double())).float()
    return x, means, precisions, (count / count.sum()).log(), covariance_type


def _patch_maps(images: int, grid: tuple[int, int], size: tuple[int, int]) -> tuple[Any, ...]:
    map = torch.rand(images, *grid, generator=torch.Generator().manual_seed(3))
    return map, list(size), 4.0, "bilinear", "reflect"


def _real(name: str) -> tuple[Any, ...]:
    return *real_rows(name, 1024), 1, "cosine"


SHAPES: dict[str, dict[str, Callable[[], tuple[Any, ...]]]] = {
    "cosine_max": {
        "image_1024x150": lambda: _features_and_rows(1024, 150),
        "batch_12288x150": lambda: _features_and_rows(12_288, 150),
        "resc_2048x150": lambda: _features_and_rows(2048, 150),
        "bank_1024x100000": lambda: _features_and_rows(1024, 100_000),
    },
    "cosine_map": {
        "image_32_to_448": lambda: (
            unit_rows(1024, 0).view(1, 32, 32, D),
            unit_rows(150, 1),
            [448, 448],
            None,
        ),
    },
    "knn_topk": {
        "bank_1024x10000_k3": lambda: (*_features_and_rows(1024, 10_000), 3, "cosine"),
        "bank_1024x100000_random": lambda: (*_features_and_rows(1024, 100_000), 1, "cosine"),
        "bank_1024x100000_clustered": lambda: (
            clustered_rows(1024, 400, 0),
            clustered_rows(100_000, 400, 1),
            1,
            "cosine",
        ),
        "brats_shot_1024x1024": lambda: (*_features_and_rows(1024, 1024), 1, "cosine"),
        "resc_shot_2048x2048": lambda: (*_features_and_rows(2048, 2048), 1, "cosine"),
        "liver_full_1024x1579008": lambda: (*_clustered_pair(1024, 1542 * 1024), 1, "cosine"),
        "brats_full_1024x7680000": lambda: (*_clustered_pair(1024, 7500 * 1024), 1, "cosine"),
        "resc_full_2048x8800256": lambda: (*_clustered_pair(2048, 4297 * 2048), 1, "cosine"),
        **{size: partial(_real, name) for size, name in REAL.items()},
    },
    "kmeans_step": {
        "batch_8192x64_random": lambda: (unit_rows(8192, 0), unit_rows(8192, 0)[:64]),
        "batch_8192x64_clustered": lambda: (clustered_rows(8192, 64, 0), clustered_rows(8192, 64, 0)[:64]),
    },
    "dpm_stats": {
        "image_1024x150_diag": lambda: _mixture(1024, 150),
        "batch_12288x500_diag": lambda: _clusters(12_288, 500, "diag"),
        "part_1024x64_full": lambda: _clusters(1024, 64, "full"),
        "batch_12288x500_full": lambda: _clusters(12_288, 500, "full"),
    },
    "upsample_blur": {
        "image_32_to_448": lambda: _patch_maps(1, (32, 32), (448, 448)),
        "resc_32x64_to_512x1024": lambda: _patch_maps(1, (32, 64), (512, 1024)),
    },
}
"""Operator -> name of a size -> what makes the operator's arguments, the same at every call."""

SHORT = [
    ("cosine_max", "resc_2048x150"),
    ("knn_topk", "resc_shot_2048x2048"),
    ("dpm_stats", "batch_12288x500_diag"),
]
"""What CI compares with a saved run. Not the coreset: its peer waits for the memory bus, it for the cache.
Not `upsample_blur`: it is work of one thread, its peers' of two, and the cores of a shared machine differ."""

SLOW = {
    ("dpm_stats", "batch_12288x500_full"): 8,
    ("knn_topk", "liver_full_1024x1579008"): 18,
    ("knn_topk", "brats_full_1024x7680000"): 88,
    ("knn_topk", "resc_full_2048x8800256"): 101,
}
"""Operators and sizes that need --slow -> GiB of memory that they need: of banks, eight times the rows."""
