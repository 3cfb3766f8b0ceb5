"""Operators: declared once, computed by the fastest kernel that can serve the call."""

from dinofast.ops.bank import Bank
from dinofast.ops.cosine_map import cosine_map
from dinofast.ops.cosine_max import cosine_max
from dinofast.ops.dpm_stats import dpm_stats
from dinofast.ops.farthest_point import farthest_point
from dinofast.ops.kmeans_step import kmeans_step
from dinofast.ops.knn_topk import knn_topk
from dinofast.ops.registry import MISSING, OPS, backend
from dinofast.ops.upsample_blur import upsample_blur

__all__ = [
    "MISSING",
    "OPS",
    "Bank",
    "backend",
    "cosine_map",
    "cosine_max",
    "dpm_stats",
    "farthest_point",
    "kmeans_step",
    "knn_topk",
    "upsample_blur",
]

from dinofast.ops import providers  # noqa: F401  (offers the kernels of the operators above)
