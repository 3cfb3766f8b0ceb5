"""Who offers which kernel, and when it refuses; the only importer of _native, _cuda and dinofast.kernels.

What cannot be loaded stays in `MISSING` with its reason.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from dinofast.ops.cosine_max import _fake as cosine_max_results
from dinofast.ops.dpm_stats import _fake as dpm_stats_results
from dinofast.ops.dpm_stats import log_constants, require_definite
from dinofast.ops.registry import MISSING, Kernel, provide

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def build() -> str:
    """Tell how this package was built: "python", "cpu", "cuda", or "not built" for a bare source tree."""
    record = Path(__file__).parents[1] / "_build.json"
    return str(json.loads(record.read_text())["build"]) if record.exists() else "not built"


def instruction_set() -> str:
    """Name what the native CPU kernels use: the best there is here, or `DINOFAST_ISA`; "none" without them.

    Raises:
        ValueError: `DINOFAST_ISA` names nothing that this processor has.
    """
    return "none" if "cpu" in MISSING else _native.isa()


def _absent(error: ImportError) -> str:
    if build() == "not built":
        return "this source tree is not built; run pip install -e ."
    return f"{error} (DINOFAST_BUILD was {build()})"


def _refuse_cosine_max(features: Tensor, prototypes: Tensor) -> str | None:
    if features.dtype not in _DTYPES:
        return f"wants float32, bfloat16 or float16, got {features.dtype}"
    if max(features.shape[0], prototypes.shape[0]) >= 1 << 31:
        return f"wants fewer than 2**31 rows, got {features.shape[0]} and {prototypes.shape[0]}"
    return None


def _refuse_dpm_stats(x: Tensor, means: Tensor, *others: Tensor | str) -> str | None:
    if x.dtype not in _DTYPES:
        return f"wants float32, bfloat16 or float16, got {x.dtype}"
    return None if means.shape[0] < 1 << 31 else f"wants fewer than 2**31 components, got {means.shape[0]}"


def _dense(x: Tensor) -> Tensor:
    """Give the matrix with contiguous channels; its rows may be strided."""
    return x if x.stride(1) == 1 else x.contiguous()


def _matrix(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.shape[0], x.stride(0)


try:
    from dinofast import _native
except ImportError as error:
    MISSING["cpu"] = _absent(error)
else:
    _NATIVE_ELEMENTS = dict(zip(_DTYPES, (_native.FLOAT32, _native.BFLOAT16, _native.FLOAT16), strict=True))
    _threads = torch.get_num_threads

    def _pin_threads() -> None:
        """Compute in one thread from now on: OpenMP's other threads did not survive the fork."""
        global _threads
        _threads = lambda: 1  # noqa: E731

    os.register_at_fork(after_in_child=_pin_threads)

    def _cosine_max_cpu(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        similarity, index = cosine_max_results(features, prototypes)
        features, prototypes = _dense(features), _dense(prototypes)
        _native.cosine_max(
            *_matrix(features),
            *_matrix(prototypes),
            features.shape[1],
            _NATIVE_ELEMENTS[features.dtype],
            similarity.data_ptr(),
            index.data_ptr(),
            _threads(),
        )
        return similarity, index

    provide("cosine_max", Kernel("cpu", ("cpu",), _cosine_max_cpu, _refuse_cosine_max))

    def dpm_stats_native(
        x: Tensor, means: Tensor, precisions: Tensor, log_weights: Tensor, covariance_type: str
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], int]:
        """Give the results and how many pairs of row and component had their log-probability computed."""
        log_likelihood, count, first, second = dpm_stats_results(
            x, means, precisions, log_weights, covariance_type
        )
        constants = log_constants(means, precisions, log_weights, covariance_type)
        x, means = _dense(x), means.contiguous()
        wide = second
        if covariance_type == "spherical":
            precisions, wide = precisions[:, None].expand(means.shape), torch.empty_like(first)
        precisions = precisions.contiguous()
        failed, evaluated = _native.dpm_stats(
            *_matrix(x),
            x.shape[1],
            _NATIVE_ELEMENTS[x.dtype],
            means.data_ptr(),
            precisions.data_ptr(),
            constants.data_ptr(),
            means.shape[0],
            covariance_type == "full",
            log_likelihood.data_ptr(),
            count.data_ptr(),
            first.data_ptr(),
            wide.data_ptr(),
            _threads(),
        )
        require_definite(failed)
        if covariance_type == "spherical":
            torch.sum(wide, 1, out=second)
        return (log_likelihood, count, first, second), evaluated

    def _dpm_stats_cpu(
        x: Tensor, means: Tensor, precisions: Tensor, log_weights: Tensor, covariance_type: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return dpm_stats_native(x, means, precisions, log_weights, covariance_type)[0]

    provide("dpm_stats", Kernel("cpu", ("cpu",), _dpm_stats_cpu, _refuse_dpm_stats))


try:
    from dinofast import _cuda
except ImportError as error:
    MISSING["cuda"] = _absent(error)
else:
    _CUDA_ELEMENTS = dict(zip(_DTYPES, (_cuda.FLOAT32, _cuda.BFLOAT16, _cuda.FLOAT16), strict=True))

    def _cosine_max_cuda(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        similarity, index = cosine_max_results(features, prototypes)
        features, prototypes = _dense(features), _dense(prototypes)
        rows = features.shape[0] + prototypes.shape[0]
        keys = torch.empty(features.shape[0], dtype=torch.int64, device=features.device)
        scales = torch.empty((rows, 2), dtype=torch.float32, device=features.device)
        with torch.cuda.device(features.device):
            _cuda.cosine_max(
                *_matrix(features),
                *_matrix(prototypes),
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
        provide("cosine_max", Kernel("cuda", ("cuda",), _cosine_max_cuda, _refuse_cosine_max))


def _cosine_max_triton(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    from dinofast.kernels.cosine_max import cosine_max  # loads Triton, which takes 0.2 s, at the first call

    similarity, index = cosine_max_results(features, prototypes)
    with torch.cuda.device(features.device if features.is_cuda else -1):
        cosine_max(_dense(features), _dense(prototypes), similarity, index)
    return similarity, index


if importlib.util.find_spec("triton") is None:
    MISSING["triton"] = "triton is not installed; pip install 'dinofast[triton]'"
elif importlib.util.find_spec("dinofast.kernels") is None:
    MISSING["triton"] = "dinofast.kernels is not installed; run pip install -e ."
elif torch.version.cuda is None and not _INTERPRETED:
    MISSING["triton"] = "this torch has no CUDA; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly"
else:
    _DEVICES = ("cuda", "cpu") if _INTERPRETED else ("cuda",)
    provide("cosine_max", Kernel("triton", _DEVICES, _cosine_max_triton, _refuse_cosine_max))
