"""Operators: declared once, computed by the fastest kernel that can serve the call.

They take torch tensors, and whatever `dinofast.interop.to_tensor` takes, such as NumPy arrays.
"""

from dinofast.ops.arrays import takes_arrays
from dinofast.ops.bank import Bank
from dinofast.ops.bank_size import bank_bytes
from dinofast.ops.cosine_map import cosine_map as _cosine_map
from dinofast.ops.cosine_max import cosine_max as _cosine_max
from dinofast.ops.dpm_stats import dpm_stats as _dpm_stats
from dinofast.ops.farthest_point import farthest_point as _farthest_point
from dinofast.ops.kmeans_step import kmeans_step as _kmeans_step
from dinofast.ops.knn_topk import knn_topk as _knn_topk
from dinofast.ops.registry import MISSING, OPS, backend, keeping
from dinofast.ops.upsample_blur import upsample_blur as _upsample_blur

__all__ = [
    "MISSING",
    "OPS",
    "Bank",
    "backend",
    "bank_bytes",
    "cosine_map",
    "cosine_max",
    "dpm_stats",
    "farthest_point",
    "keeping",
    "kmeans_step",
    "knn_topk",
    "upsample_blur",
]

cosine_map = takes_arrays(_cosine_map)
cosine_max = takes_arrays(_cosine_max)
dpm_stats = takes_arrays(_dpm_stats)
farthest_point = takes_arrays(_farthest_point)
kmeans_step = takes_arrays(_kmeans_step)
knn_topk = takes_arrays(_knn_topk)
upsample_blur = takes_arrays(_upsample_blur)

from dinofast.ops import providers  # noqa: E402, F401  (offers the kernels of the operators above)
