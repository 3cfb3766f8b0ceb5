"""The native CPU kernels: every instruction set of this machine, threads, fork, where wide code stands."""

import math
import re
import shutil
import subprocess
import sys

import pytest
import torch

from dinofast import ops
from dinofast.errors import InputError
from dinofast.ops.registry import OPS
from dinofast.testing import assert_kernel, cast_inputs

native = pytest.importorskip("dinofast._native", reason="built without native kernels")
OP = OPS["cosine_max"]
KERNEL = next(kernel for kernel in OP.kernels if kernel.backend == "cpu")
ISAS = native.available_isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_sample(isa, dtype):
    for sample in OP.samples():
        assert_kernel(OP, KERNEL, cast_inputs(OP, sample.args, dtype))


@pytest.mark.parametrize("d", [1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 129])
def test_tails(isa, d):
    for n, k in ((1, 1), (3, 2), (5, 15), (7, 17), (11, 31), (12, 32), (13, 33), (25, 65)):
        assert_kernel(OP, KERNEL, (torch.randn(n, d), torch.randn(k, d)))


def test_more_prototypes_than_one_block_holds(isa):
    prototypes = torch.randn(1100, 4096)
    prototypes[900] = prototypes[37]
    features = torch.cat([torch.randn(26, 4096), prototypes[[37, 700, 900, 1099]]])
    assert_kernel(OP, KERNEL, (features, prototypes))
    assert KERNEL.run(features, prototypes)[1][26:].tolist() == [37, 700, 37, 1099]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number(isa, dtype):
    number = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    features = torch.stack([number, torch.full_like(number, 0.5)], dim=1)
    prototypes = torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=dtype)
    assert_kernel(OP, KERNEL, (features, prototypes))


def test_ties_go_to_the_smallest_index_across_panels(isa):
    prototypes = torch.randn(1, 33).expand(200, 33)
    assert KERNEL.run(torch.randn(50, 33), prototypes)[1].tolist() == [0] * 50


@pytest.mark.parametrize("k", [3, 1100])
def test_one_broken_prototype_makes_every_similarity_nan(isa, k):
    prototypes = torch.randn(k, 4096)
    for broken in (0, k - 1):
        for value in (math.nan, math.inf):
            bad = prototypes.clone()
            bad[broken, 7] = value
            similarity, index = KERNEL.run(torch.randn(40, 4096), bad)
            assert bool(similarity.isnan().all())
            assert bool(((index >= 0) & (index < k)).all())


def test_same_bits_for_any_number_of_threads(isa, restored_threads):
    args = torch.randn(1000, 384), torch.randn(150, 384)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ops.cosine_max(*args))
    for similarity, index in found[1:]:
        assert torch.equal(similarity, found[0][0])
        assert torch.equal(index, found[0][1])


@pytest.mark.parametrize("name", ["sse9", "neon", "AVX2"])
def test_an_unavailable_isa_is_an_error_that_lists_what_there_is(monkeypatch, name):
    monkeypatch.setenv("DINOFAST_ISA", name)
    with pytest.raises(ValueError, match=f"DINOFAST_ISA={name}: .*available: {', '.join(ISAS)}"):
        native.isa()
    with pytest.raises(InputError, match=f"DINOFAST_ISA={name}"):
        ops.cosine_max(torch.ones(1, 2), torch.ones(1, 2))


@pytest.mark.skipif(shutil.which("objdump") is None or len(ISAS) == 1, reason="no objdump, or not x86")
def test_wide_instructions_stand_only_in_their_own_functions():
    dump = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", native.__file__],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = {"avx512": set(), "avx2": set()}
    function = ""
    for line in dump.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = header[1]
        elif re.search(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])", line):
            found["avx512"].add(function)
        elif re.search(r"\tv\w+ .*%[xy]mm", line):
            found["avx2"].add(function)
    assert found["avx512"], "no AVX-512 code at all"
    assert all("Avx512" in name for name in found["avx512"]), found["avx512"]
    assert any("Avx2" in name for name in found["avx2"]), "no AVX2 code at all"
    assert all("Avx2" in name or "Avx512" in name for name in found["avx2"]), found["avx2"]


def run_python(code, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_isa_is_forced_from_the_environment():
    code = "from dinofast import _native; print(_native.isa())"
    for name in ISAS:
        assert run_python(code, DINOFAST_ISA=name).stdout.strip() == name


@pytest.mark.skipif(not sys.platform.startswith("linux") or not native.OPENMP, reason="no libgomp")
def test_one_libgomp_is_mapped():
    code = """
import torch
from dinofast import ops
ops.cosine_max(torch.randn(500, 384), torch.randn(50, 384))
with open("/proc/self/maps") as maps:
    print(len({line.split()[-1] for line in maps if "libgomp" in line}))
"""
    run = run_python(code)
    assert run.stdout.strip() == "1", run.stdout + run.stderr


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork")
def test_a_forked_child_neither_hangs_nor_changes_numbers():
    code = """
import os, warnings
import torch
from dinofast import ops
warnings.simplefilter("ignore")
torch.set_num_threads(2)
args = torch.randn(1000, 384), torch.randn(150, 384)
before = ops.cosine_max(*args)
child = os.fork()
if child == 0:
    after = ops.cosine_max(*args)
    same = all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(after, before))
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run = run_python(code)
    assert run.stdout.strip() == "0", run.stdout + run.stderr
