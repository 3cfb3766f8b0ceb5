"""Kernels in Triton: the only importer of dinofast.kernels, which loads Triton (0.2 s) at the first call."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dinofast.ops.cosine_map import _fake as cosine_map_results
from dinofast.ops.cosine_max import _fake as cosine_max_results
from dinofast.ops.dpm_stats import _fake as dpm_stats_results
from dinofast.ops.dpm_stats import negligible_nats
from dinofast.ops.farthest_point import _fake as farthest_point_results
from dinofast.ops.kmeans_step import _fake as kmeans_step_results
from dinofast.ops.knn_topk import METRICS
from dinofast.ops.knn_topk import _fake as knn_topk_results
from dinofast.ops.providers.shared import capability, dense, refuse_dtype, unserved
from dinofast.ops.registry import DEVICES, MISSING, Kernel, forced_backend, kept, provide
from dinofast.ops.upsample_blur import Weights, resample_weights
from dinofast.ops.upsample_blur import _fake as upsample_blur_results

if TYPE_CHECKING:
    from dinofast.kernels.resample import Axis

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")
_MOST_NEIGHBORS = 64
_MOST_ROWS = 1 << 30
"""Row numbers of the last, partly empty block must fit int32."""
_MOST_COMPONENTS = 65535
"""Programs along the second axis of a launch; what dpm_stats holds at a time is bounded up to there."""


def on(x: Tensor) -> AbstractContextManager[object]:
    """Launch on the device of `x`."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


def _cosine_max(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    from dinofast.kernels.cosine_max import cosine_max

    similarity, index = cosine_max_results(features, prototypes)
    with on(features):
        cosine_max(dense(features), dense(prototypes), similarity, index)
    return similarity, index


def _refuse_search(queries: Tensor, bank: Tensor) -> str | None:
    if max(queries.shape[0], bank.shape[0]) > _MOST_ROWS:
        return f"wants at most 2**30 rows, got {queries.shape[0]} and {bank.shape[0]}"
    return refuse_dtype(queries)


def _refuse_knn_topk(queries: Tensor, bank: Tensor, k: int, metric: str) -> str | None:
    return f"wants k <= {_MOST_NEIGHBORS}, got {k}" if k > _MOST_NEIGHBORS else _refuse_search(queries, bank)


def _knn_topk(queries: Tensor, bank: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    from dinofast.kernels.knn_topk import knn_topk

    distance, index = knn_topk_results(queries, bank, k, metric)
    with on(queries):
        knn_topk(dense(queries), dense(bank), k, METRICS.index(metric), distance, index)
    return distance, index


@lru_cache(maxsize=64)
def _axes(
    grid: tuple[int, int], size: tuple[int, int], sigma: float, mode: str, boundary: str, device: torch.device
) -> tuple[Axis, Axis]:
    """Give the weights of rows and columns on the device."""
    pairs = zip(grid, size, strict=True)
    rows, columns = (
        _axis(resample_weights(source, target, sigma, mode, boundary)[0], device) for source, target in pairs
    )
    return rows, columns


def _axis(weights: Weights, device: torch.device) -> Axis:
    from dinofast.kernels.cosine_map import PATCH_COLUMNS, PATCH_ROWS
    from dinofast.kernels.resample import Axis, blocks

    start = weights.start.long()
    count = start[1:] - start[:-1]
    row = torch.arange(weights.count).repeat_interleave(count)
    entry = torch.arange(len(weights.index)) - start[row]
    index = torch.full((weights.count, int(count.max())), -1, dtype=torch.int32)
    weight = torch.zeros(index.shape)
    index[row, entry], weight[row, entry] = weights.index, weights.weight
    return Axis(index.to(device), weight.to(device), blocks(index, PATCH_ROWS, PATCH_COLUMNS))


def _refuse_maps(x: Tensor, size: list[int], *, patches: Tensor) -> str | None:
    if max(patches.numel(), patches.shape[0] * size[0] * size[1]) > _MOST_ROWS:
        return f"wants at most 2**30 patches and pixels, got {tuple(patches.shape)} to {tuple(size)}"
    return refuse_dtype(x)


def _refuse_upsample_blur(map: Tensor, size: list[int], sigma: float, mode: str, boundary: str) -> str | None:
    return _refuse_maps(map, size, patches=map)


def _upsample_blur(map: Tensor, size: list[int], sigma: float, mode: str, boundary: str) -> Tensor:
    from dinofast.kernels.resample import upsample_blur

    pixels = upsample_blur_results(map, size, sigma, mode, boundary)
    (h, w), (height, width) = map.shape[1:], size
    with on(map):
        axes = kept(_axes((h, w), (height, width), sigma, mode, boundary, map.device))
        upsample_blur(map.contiguous(), *axes, pixels)
    return pixels


def _refuse_cosine_map(
    features: Tensor, prototypes: Tensor, size: list[int], mask: Tensor | None
) -> str | None:
    if prototypes.shape[0] > _MOST_ROWS:
        return f"wants at most 2**30 prototypes, got {prototypes.shape[0]}"
    return _refuse_maps(features, size, patches=features[..., 0])


def _cosine_map(features: Tensor, prototypes: Tensor, size: list[int], mask: Tensor | None) -> Tensor:
    from dinofast.kernels.cosine_map import cosine_map

    pixels = cosine_map_results(features, prototypes, size, mask)
    (b, h, w, d), (height, width) = features.shape, size
    bits = None if mask is None else mask.contiguous().view(torch.uint8)
    with on(features):
        axes = kept(_axes((h, w), (height, width), 0.0, "bilinear", "reflect", features.device))
        rows = dense(features.reshape(-1, d))
        cosine_map(rows, dense(prototypes), (b, h, w), bits, *axes, pixels)
    return pixels


def _refuse_rows(rows: Tensor, *_: Tensor) -> str | None:
    if rows.shape[0] > _MOST_ROWS:
        return f"wants at most 2**30 rows, got {rows.shape[0]}"
    return refuse_dtype(rows)


def _farthest_point(rows: Tensor, min_distance: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    from dinofast.kernels.farthest_point import farthest_point

    nearest, farthest = farthest_point_results(rows, min_distance, index)
    with on(rows):
        farthest_point(dense(rows), min_distance.contiguous(), index, nearest, farthest)
    return nearest, farthest


def _kmeans_step(rows: Tensor, centers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from dinofast.kernels.kmeans_step import kmeans_step

    index, sq_distance, sums, counts = kmeans_step_results(rows, centers)
    with on(rows):
        kmeans_step(dense(rows), dense(centers), index, sq_distance, sums, counts)
    return index, sq_distance, sums, counts


def _refuse_dpm_stats(x: Tensor, means: Tensor, *_: object) -> str | None:
    if x.shape[0] > _MOST_ROWS or means.shape[0] > _MOST_COMPONENTS:
        return f"wants at most 2**30 rows and 65535 components, got {x.shape[0]} and {means.shape[0]}"
    return refuse_dtype(x)


def _dpm_stats(
    x: Tensor, means: Tensor, precisions: Tensor, log_weights: Tensor, covariance_type: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from dinofast.kernels.dpm_stats import dpm_stats

    results = dpm_stats_results(x, means, precisions, log_weights, covariance_type)
    log_likelihood, count, first, second = results
    wide = torch.empty_like(first) if covariance_type == "spherical" else second
    drop = negligible_nats(means.shape[0])
    with on(x):
        parameters = means.contiguous(), precisions.contiguous(), log_weights.contiguous()
        dpm_stats(dense(x), *parameters, drop, log_likelihood, (count, first, wide))
        if covariance_type == "spherical":
            torch.sum(wide, 1, out=second)
    return results


def refuse_device(device: torch.device) -> str | None:
    """Give the reason why Triton does not serve a GPU, or None.

    References:
        triton-lang/triton, pull request 5066: compute capability 8.0 and later since Triton 3.3.
    """
    found = capability(device)
    return None if found >= 80 else unserved(device, found, "compute capability 8.0 or later, as Triton does")


def on_served_device(refuse: Callable[..., str | None]) -> Callable[..., str | None]:
    """Refuse what is on a GPU that Triton does not serve, and what `refuse` refuses."""

    def refuse_both(first: Tensor, *others: Any) -> str | None:
        return (refuse_device(first.device) if first.is_cuda else None) or refuse(first, *others)

    return refuse_both


_DEVICES = ("cuda", "cpu") if _INTERPRETED else ("cuda",)


def coded_kernels(device: torch.device) -> Any:
    """Offer the launchers of `kernels.knn_topk_coded`; None where they do not run, or others are forced.

    On the CPU, where only the interpreter runs them, they must be forced.
    """
    wanted = ("triton",) if device.type == "cpu" else ("triton", None)
    if "triton" in MISSING or device.type not in _DEVICES or forced_backend() not in wanted:
        return None
    if device.type == "cuda" and refuse_device(device) is not None:
        return None
    from dinofast.kernels import knn_topk_coded

    return knn_topk_coded


def unit_factors(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Give the two factors (N,) that bring rows to unit norm, as every kernel finds them."""
    from dinofast.kernels.tile import scale_factors

    with on(rows):
        first, second = scale_factors(dense(rows))
    return first, second


if importlib.util.find_spec("triton") is None:
    MISSING["triton"] = "triton is not installed; pip install 'dinofast[triton]'"
elif importlib.util.find_spec("dinofast.kernels") is None:
    MISSING["triton"] = "dinofast.kernels is not installed; run pip install -e ."
elif torch.version.cuda is None and not _INTERPRETED:
    MISSING["triton"] = "this torch has no CUDA; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly"
else:
    DEVICES["triton"] = refuse_device
    for name, run, refuse in (
        ("cosine_max", _cosine_max, _refuse_search),
        ("knn_topk", _knn_topk, _refuse_knn_topk),
        ("upsample_blur", _upsample_blur, _refuse_upsample_blur),
        ("cosine_map", _cosine_map, _refuse_cosine_map),
        ("farthest_point", _farthest_point, _refuse_rows),
        ("kmeans_step", _kmeans_step, _refuse_rows),
        ("dpm_stats", _dpm_stats, _refuse_dpm_stats),
    ):
        provide(name, Kernel("triton", _DEVICES, run, on_served_device(refuse)))
