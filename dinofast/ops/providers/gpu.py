"""Kernels in CUDA C++: the only importer of _cuda."""

from __future__ import annotations

import torch
from torch import Tensor

from dinofast.ops.cosine_max import _fake as cosine_max_results
from dinofast.ops.providers.shared import (
    DTYPES,
    absent,
    capability,
    dense,
    matrix,
    refuse_rows,
    unserved,
)
from dinofast.ops.registry import DEVICES, MISSING, Kernel, provide


def refuse_device(device: torch.device, built: tuple[int, ...]) -> str | None:
    """Give the reason why a build for these compute capabilities does not run on a GPU, or None.

    Machine code runs where the major number is its own and the minor one at least its own; that of the newest
    is there as PTX, too, which every later GPU compiles for itself.
    """
    found = capability(device)
    if found >= max(built) or any(arch // 10 == found // 10 and arch <= found for arch in built):
        return None
    archs = ", ".join(f"{arch / 10:.1f}" for arch in sorted(built))
    wanted = f"compute capability {archs} or later: what it was built for (DINOFAST_CUDA_ARCHS)"
    return unserved(device, found, wanted)


def left_to_tensor_cores(features: Tensor, prototypes: Tensor) -> str | None:
    """Say why Triton should rather multiply, where it can, or None."""
    # No GPU has compared the two: the rule follows the arithmetic. Triton multiplies half precision on tensor
    # cores, about 15 times what the scalar units do that this kernel uses; float32 is scalar in both.
    return None if features.dtype == torch.float32 else f"{features.dtype} is left to tensor cores"


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

        def refuse(features: Tensor, prototypes: Tensor) -> str | None:
            """Give the reason why the kernel cannot serve a call, or None."""
            return refuse_device(features.device, _cuda.ARCHS) or refuse_rows(features, prototypes)

        provide("cosine_max", Kernel("cuda", ("cuda",), _cosine_max_cuda, refuse, left_to_tensor_cores))
        DEVICES["cuda"] = lambda device: refuse_device(device, _cuda.ARCHS)
