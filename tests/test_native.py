"""The native modules are there unless the build was made without them, and setup.py says what it misses."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from dinofast.ops import MISSING
from dinofast.ops.providers import build, shared
from dinofast.ops.registry import OPS

ROOT = Path(__file__).parents[1]
SETUP = ROOT / "setup.py"


def can_run_setup():
    try:
        return SETUP.exists() and int(version("setuptools").split(".")[0]) >= 77
    except PackageNotFoundError:
        return False


needs_setup = pytest.mark.skipif(not can_run_setup(), reason="no source tree, or setuptools is older than 77")


def backends(name):
    return [kernel.backend for kernel in OPS[name].kernels]


def test_native_is_there_unless_the_build_was_pure_python():
    assert build() in ("python", "cpu", "cuda"), "this tree is not built: pip install -e ."
    if build() == "python":
        assert "built without it (no C++ compiler found, or DINOFAST_BUILD=python)" in MISSING["cpu"]
        assert "slower" in MISSING["cpu"]
        assert "cpu" not in backends("cosine_max")
        return
    assert "cpu" not in MISSING
    assert backends("cosine_max")[0] == "cpu"


def test_a_python_build_says_that_it_is_slower(monkeypatch):
    monkeypatch.setattr(shared, "build", lambda: "python")
    assert "everything still works, slower; install C++ compiler" in shared.absent(
        ImportError(), "C++ compiler"
    )


def test_cuda_module_imports_without_a_gpu():
    if build() != "cuda":
        assert "cuda" in MISSING
        return
    from dinofast import _cuda

    assert _cuda.ARCHS
    assert all(arch >= 50 for arch in _cuda.ARCHS)
    problem = _cuda.driver_problem()
    assert MISSING.get("cuda", "") == problem
    assert ("cuda" in backends("cosine_max")) == (problem == "")


def plan(tmp_path, *python, **environment):
    """Run setup.py, or `python`, as far as its decision, with no tool on the PATH."""
    keep = {name: value for name, value in os.environ.items() if name not in ("CXX", "DINOFAST_BUILD")}
    return subprocess.run(
        [sys.executable, *(python or (str(SETUP), "--name"))],
        env={**keep, "PATH": str(tmp_path), **environment},
        cwd=SETUP.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )


@needs_setup
def test_without_a_compiler_the_plan_is_pure_python_and_says_so(tmp_path):
    run = plan(tmp_path)
    assert run.returncode == 0, run.stderr
    assert "a C++ compiler" in run.stdout
    assert "slower" in run.stdout


@needs_setup
@pytest.mark.parametrize("wanted", ["cpu", "cuda"])
def test_an_explicit_build_is_never_downgraded(tmp_path, wanted):
    run = plan(tmp_path, DINOFAST_BUILD=wanted)
    assert run.returncode != 0
    assert f"DINOFAST_BUILD={wanted}: not found: a C++ compiler" in run.stderr


@needs_setup
def test_an_unknown_build_is_refused(tmp_path):
    run = plan(tmp_path, DINOFAST_BUILD="fast")
    assert run.returncode != 0
    assert "DINOFAST_BUILD=fast: unknown; one of python, cpu, cuda" in run.stderr


@needs_setup
def test_windows_gets_pure_python(tmp_path):
    script = (
        "import platform, runpy, setuptools, sys; platform.system = lambda: 'Windows'; "
        "sys.argv = ['setup.py', '--name']; runpy.run_path('setup.py')"
    )
    run = plan(tmp_path, "-c", script)
    assert run.returncode == 0, run.stderr
    assert "a system other than Windows (use WSL)" in run.stdout
    assert (
        "DINOFAST_BUILD=cpu: not found: a system" in plan(tmp_path, "-c", script, DINOFAST_BUILD="cpu").stderr
    )


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="csrc/ is not beside the tests")
def test_the_sanitized_build_has_every_call_of_the_openmp_runtime():
    """Else ThreadSanitizer's build would take some calls from libgomp and some from csrc/sanitize."""
    native = pytest.importorskip("dinofast._native", reason="built without native kernels")
    called = set(re.findall(rb"\0((?:GOMP|omp)_[a-z]\w+)", Path(native.__file__).read_bytes()))
    assert called or not native.OPENMP
    source = (ROOT / "csrc/sanitize/openmp.cpp").read_text()
    assert {name.decode() for name in called} <= set(re.findall(r"GOMP [\w ]+? \**(\w+)\(", source))


@pytest.mark.skipif(not (ROOT / ".ci/sanitize").is_file(), reason=".ci/ is not beside the tests")
def test_the_sanitizers_leave_out_only_tests_that_exist():
    """By their whole names: a part of one would take others along."""
    script = (ROOT / ".ci/sanitize").read_text()
    [chosen] = re.findall(r"^tests=\((.*)\)$", script, re.MULTILINE)
    assert {"screen", "kmeans", "bank", "ops"} <= set(chosen.split())
    assert all((ROOT / f"tests/test_{name}.py").is_file() for name in chosen.split())
    left_out = re.findall(r"^    (test_\w+\.py)::(\w+)$", script, re.MULTILINE)
    assert len(left_out) == 3
    for file, name in left_out:
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text()
    assert " -k " not in script
