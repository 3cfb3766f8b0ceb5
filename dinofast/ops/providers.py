"""Who offers which kernel, and when it refuses; the only importer of _native, _cuda and dinofast.kernels.

What cannot be loaded stays in `MISSING` with its reason.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from dinofast.ops.cosine_max import _fake as cosine_max_results
from dinofast.ops.registry import MISSING, Kernel, provide


def build() -> str:
    """Tell how this package was built: "python", "cpu", "cuda", or "not built" for a bare source tree."""
    record = Path(__file__).parents[1] / "_build.json"
    return str(json.loads(record.read_text())["build"]) if record.exists() else "not built"


def _absent(error: ImportError) -> str:
    if build() == "not built":
        return "this source tree is not built; run pip install -e ."
    return f"{error} (the build was {build()!r})"


def _refuse_dtype(features: Tensor, prototypes: Tensor) -> str | None:
    if features.dtype not in _DTYPES:
        return f"wants float32, bfloat16 or float16, got {features.dtype}"
    if prototypes.shape[0] >= 1 << 31:
        return f"wants K < 2**31, got {prototypes.shape[0]}"
    return None


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

try:
    from dinofast import _native
except ImportError as error:
    MISSING["cpu"] = _absent(error)
else:
    _NATIVE_ELEMENT = {
        torch.float32: _native.FLOAT32,
        torch.bfloat16: _native.BFLOAT16,
        torch.float16: _native.FLOAT16,
    }
    _threads = torch.get_num_threads

    def _pin_threads() -> None:
        """Compute in one thread from now on: OpenMP's other threads did not survive the fork."""
        global _threads
        _threads = _one

    def _one() -> int:
        return 1

    os.register_at_fork(after_in_child=_pin_threads)

    def _cosine_max_cpu(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        similarity, index = cosine_max_results(features, prototypes)
        features, prototypes = _dense_rows(features), _dense_rows(prototypes)
        _native.cosine_max(
            features.data_ptr(),
            features.shape[0],
            features.stride(0),
            prototypes.data_ptr(),
            prototypes.shape[0],
            prototypes.stride(0),
            features.shape[1],
            _NATIVE_ELEMENT[features.dtype],
            similarity.data_ptr(),
            index.data_ptr(),
            _threads(),
        )
        return similarity, index

    provide("cosine_max", Kernel("cpu", ("cpu",), _cosine_max_cpu, _refuse_dtype))
