"""What offers of several backends share: how this package was built, and how tensors become pointers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def build() -> str:
    """Tell how this package was built: "python", "cpu", "cuda", or "not built" for a bare source tree."""
    record = Path(__file__).parents[2] / "_build.json"
    return str(json.loads(record.read_text())["build"]) if record.exists() else "not built"


def absent(error: ImportError, tool: str) -> str:
    """Say why a module is missing: the build did not make it, or it is there and cannot be loaded."""
    made = build()
    if made == "not built":
        return "this source tree is not built; run pip install -e ."
    if made == "cuda" or (made == "cpu" and tool != "nvcc"):
        return str(error)
    return (
        f"built without it (no {tool} found, or DINOFAST_BUILD={made}): everything still works, slower; "
        f"install {tool} and reinstall"
    )


def refuse_dtype(x: Tensor, *_: object) -> str | None:
    """Give the reason why kernels cannot serve the dtype of a call's first argument, or None."""
    return None if x.dtype in DTYPES else f"wants float32, bfloat16 or float16, got {x.dtype}"


def refuse_rows(first: Tensor, second: Tensor) -> str | None:
    """Give the reason why kernels that count in 32 bits cannot serve two matrices of rows, or None."""
    if max(first.shape[0], second.shape[0]) >= 1 << 31:
        return f"wants fewer than 2**31 rows, got {first.shape[0]} and {second.shape[0]}"
    return refuse_dtype(first)


def capability(device: torch.device) -> int:
    """Give a GPU's compute capability, such as 80 for 8.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def unserved(device: torch.device, found: int, wanted: str) -> str:
    """Say that kernels cannot run on a GPU of a compute capability."""
    name = torch.cuda.get_device_name(device)
    return f"wants {wanted}; {name} has compute capability {found / 10:.1f}"


def dense(x: Tensor) -> Tensor:
    """Give the matrix with contiguous channels; its rows may be strided."""
    return x if x.stride(1) == 1 else x.contiguous()


def matrix(x: Tensor) -> tuple[int, int, int]:
    """Give a dense matrix as native code takes it: pointer, rows, elements from row to row."""
    return x.data_ptr(), x.shape[0], x.stride(0)
