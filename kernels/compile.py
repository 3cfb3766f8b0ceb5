"""Compile every Triton kernel ahead of time and tell what each needs; no GPU and no driver are involved."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from dinofast.kernels import (
    cosine_map,
    cosine_max,
    dpm_stats,
    farthest_point,
    kmeans_step,
    knn_topk,
    knn_topk_coded,
    resample,
)
from dinofast.kernels.tile import Variant
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

LAUNCHERS = (
    cosine_max,
    knn_topk,
    knn_topk_coded,
    cosine_map,
    resample,
    farthest_point,
    kmeans_step,
    dpm_stats,
)


@dataclass(frozen=True)
class Compiled:
    """What one kernel variant needs on one architecture.

    Attributes:
        operator: operator, kernel and dtype, such as "cosine_max.best fp32".
        arch: compute capability, such as 90.
        registers: registers a thread.
        shared: bytes of shared memory a program.
        spills: bytes that a thread stores to local memory because registers ran out.
    """

    operator: str
    arch: int
    registers: int
    shared: int
    spills: int


def variants() -> list[Variant]:
    """List every kernel variant of every launcher."""
    return [variant for launcher in LAUNCHERS for variant in launcher.variants()]


def compile_variant(variant: Variant, arch: int) -> Compiled:
    """Compile one variant for compute capability `arch`, such as 90.

    Raises:
        Exception: whatever Triton or ptxas says when it cannot compile it.
    """
    names = [parameter.name for parameter in variant.kernel.params]
    types = [variant.signature.get(name, "constexpr").partition(":") for name in names]
    source = ASTSource(
        variant.kernel,
        signature={name: kind for name, (kind, _, _) in zip(names, types, strict=True)},
        constexprs=variant.constants,
        attrs={(i,): [["tt.divisibility", int(by)]] for i, (_, _, by) in enumerate(types) if by},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=variant.options)
    registers, spills = assemble(compiled.asm["ptx"], arch)
    return Compiled(variant.name, arch, registers, int(compiled.metadata.shared), spills)


def assemble(ptx: str, arch: int) -> tuple[int, int]:
    """Run ptxas and give (registers a thread, bytes spilled by a thread).

    Raises:
        RuntimeError: ptxas rejects the kernel.
    """
    target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    if target is None:
        raise RuntimeError("the PTX names no target")
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary, "kernel.ptx")
        source.write_text(ptx)
        command = [
            get_ptxas(arch).path,
            "-v",
            f"--gpu-name={target[1]}",
            str(source),
            "-o",
            str(source.with_suffix(".cubin")),
        ]
        run = subprocess.run(command, capture_output=True, text=True)
    used = re.search(r"Used (\d+) registers", run.stderr)
    if run.returncode != 0 or used is None:
        raise RuntimeError(f"ptxas: {run.stderr.strip()}")
    spilled = re.search(r"(\d+) bytes spill stores", run.stderr)
    return int(used[1]), int(spilled[1]) if spilled else 0
