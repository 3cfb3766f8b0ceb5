"""Triton kernels without a GPU: compiled ahead of time for three architectures, run by the interpreter."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiles_ahead_of_time(arch):
    run = run_python("-m", "dinofast.kernels", "--arch", str(arch), "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert {f"cosine_max.best {dtype}" for dtype in ("fp32", "bf16", "fp16")} <= {
        x["operator"] for x in found
    }
    for kernel in found:
        assert kernel["arch"] == arch
        assert 0 < kernel["registers"] <= 255
        assert kernel["shared"] <= SHARED_LIMIT[arch]
        assert kernel["spills"] == 0, kernel


def test_a_kernel_that_does_not_compile_fails_the_run():
    code = """
import sys
from dataclasses import replace
from dinofast.kernels import __main__, compile
good = compile.variants()[-1]
compile.variants = lambda: [good, replace(good, name="broken", constants={"ROWS": 100})]
sys.argv = ["dinofast.kernels", "--json"]
sys.exit(__main__.main())
"""
    run = run_python("-c", code)
    assert run.returncode == 1, run.stderr
    assert "broken, sm_90: " in run.stderr
    assert len(json.loads(run.stdout)) == 1


INTERPRETED = """
import warnings
import torch
warnings.filterwarnings("ignore", "invalid value encountered")  # numpy, on the broken rows
from dinofast import ops
from dinofast.ops.registry import OPS
from dinofast.testing import assert_kernel, cast_inputs
op = OPS["cosine_max"]
kernel = next(kernel for kernel in op.kernels if kernel.backend == "triton")
samples = op.samples()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for sample in samples if dtype == torch.float32 else samples[-6:]:
        assert_kernel(op, kernel, cast_inputs(op, sample.args, dtype))
with ops.backend("triton"):
    rows = torch.eye(3)
    assert ops.cosine_max(rows, rows[[1, 0, 0, 2, 0]].repeat(30, 1))[1].tolist() == [1, 0, 3]
    broken = torch.randn(70, 3)
    broken[66, 1] = torch.nan
    assert bool(ops.cosine_max(rows, broken)[0].isnan().all())
    similarity, index = ops.cosine_max(torch.zeros(2, 3), -rows)
    assert similarity.tolist() == [0, 0] and index.tolist() == [0, 0]
print("checked", len(samples))
"""


def test_the_interpreter_agrees_with_the_reference():
    run = run_python("-W", "error", "-c", INTERPRETED, TRITON_INTERPRET="1")
    assert run.stdout.startswith("checked"), run.stdout + run.stderr
