"""Kernels in CUDA C++: the only importer of _cuda."""

from __future__ import annotations

import torch
from torch import Tensor

from dinofast.ops.cosine_max import _fake as cosine_max_results
from dinofast.ops.providers.shared import DTYPES, absent, dense, matrix, refuse_rows
from dinofast.ops.registry import MISSING, Kernel, provide

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
        provide("cosine_max", Kernel("cuda", ("cuda",), _cosine_max_cuda, refuse_rows))
