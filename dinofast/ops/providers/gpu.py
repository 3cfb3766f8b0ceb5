"""Kernels in CUDA and Triton: the only importer of _cuda and dinofast.kernels."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from dinofast.ops.cosine_max import _fake as cosine_max_results
from dinofast.ops.providers.shared import DTYPES, absent, dense, matrix, refuse_cosine_max
from dinofast.ops.registry import MISSING, Kernel, provide

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")

try:
    from dinofast import _cuda
except ImportError as error:
    MISSING["cuda"] = absent(error, "nvcc")
else:
    _CUDA_ELEMENTS = dict(zip(DTYPES, (_cuda.FLOAT32, _cuda.BFLOAT16, _cuda.FLOAT16), strict=True))

    def _cosine_max_cuda(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        similarity, index = cosine_max_results(features, prototypes)
        features, prototypes = dense(features), dense(prototypes)
        rows = features.shape[0] + prototypes.shape[0]
        keys = torch.empty(features.shape[0], dtype=torch.int64, device=features.device)
        scales = torch.empty((rows, 2), dtype=torch.float32, device=features.device)
        with torch.cuda.device(features.device):
            _cuda.cosine_max(
                *matrix(features),
                *matrix(prototypes),
                features.shape[1],
                _CUDA_ELEMENTS[features.dtype],
                similarity.data_ptr(),
                index.data_ptr(),
                keys.data_ptr(),
                scales.data_ptr(),
                features.device.index,
                torch.cuda.current_stream().cuda_stream,
            )
        return similarity, index

    if _cuda.driver_problem():
        MISSING["cuda"] = _cuda.driver_problem()
    else:
        provide("cosine_max", Kernel("cuda", ("cuda",), _cosine_max_cuda, refuse_cosine_max))


def _cosine_max_triton(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    from dinofast.kernels.cosine_max import cosine_max  # loads Triton, which takes 0.2 s, at the first call

    similarity, index = cosine_max_results(features, prototypes)
    with torch.cuda.device(features.device if features.is_cuda else -1):
        cosine_max(dense(features), dense(prototypes), similarity, index)
    return similarity, index


if importlib.util.find_spec("triton") is None:
    MISSING["triton"] = "triton is not installed; pip install 'dinofast[triton]'"
elif importlib.util.find_spec("dinofast.kernels") is None:
    MISSING["triton"] = "dinofast.kernels is not installed; run pip install -e ."
elif torch.version.cuda is None and not _INTERPRETED:
    MISSING["triton"] = "this torch has no CUDA; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly"
else:
    _DEVICES = ("cuda", "cpu") if _INTERPRETED else ("cuda",)
    provide("cosine_max", Kernel("triton", _DEVICES, _cosine_max_triton, refuse_cosine_max))
