"""What this installation can do, and what it cannot and why."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

import torch

from dinofast import __version__, ops
from dinofast.errors import InputError
from dinofast.ops import providers

OPTIONAL = (
    "transformers",
    "triton",
    "cupy-cuda13x",
    "nibabel",
    "pydicom",
    "matplotlib",
    "typer",
    "faiss-cpu",
)


def info() -> dict[str, Any]:
    """Tell versions, devices, threads, instruction set, and which backend computes which operator.

    Returns:
        JSON types. "backends" maps each backend to "found", with the reason why it does not run on a GPU that
        is here, or to the reason why it is missing; "operators" maps each operator to its kernels in the
        order in which they are tried. Where `DINOFAST_ISA` or `DINOFAST_BACKEND` cannot be used,
        "instruction_set" or "forced_backend" says why.
    """
    offered = {kernel.backend for op in ops.OPS.values() for kernel in op.kernels}
    backends = {
        name: _found(name) if name in offered else ops.MISSING.get(name, "offers no kernel here")
        for name in ops.registry.BACKENDS
    }
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "dinofast": __version__,
        "build": providers.build(),
        "backends": backends,
        "operators": {name: [kernel.backend for kernel in op.kernels] for name, op in ops.OPS.items()},
        "forced_backend": _told(ops.registry.forced_backend) or "none",
        "instruction_set": _told(providers.instruction_set),
        "threads": torch.get_num_threads(),
        "devices": ["cpu", *cuda],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "packages": {name: _version(name) for name in OPTIONAL},
    }


def _found(backend: str) -> str:
    ask = ops.registry.DEVICES.get(backend)
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count() if ask else 0)]
    problems = [f"not on {device}: {why}" for device in devices if ask is not None and (why := ask(device))]
    return "; ".join(["found", *problems])


def _told(question: Callable[[], str | None]) -> str | None:
    try:
        return question()
    except InputError as error:
        return str(error)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
