"""Hand csrc/ to CMake and Ninja; without a compiler, install the pure-Python package and say so.

DINOFAST_BUILD        unset: CUDA if nvcc is found, else C++, else pure Python; or "python", "cpu", "cuda",
                      where a missing tool is an error.
DINOFAST_CUDA_ARCHS   compute capabilities, such as "80;90"; PTX of the newest is added (default: those of
                      80, 90 and 100 that nvcc knows).
DINOFAST_SANITIZE     "address" or "thread": what `.ci/sanitize` tests; such a module needs its sanitizer's
                      library loaded first.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODULES = {"python": [], "cpu": ["_native"], "cuda": ["_native", "_cuda"]}
ARCHS = ("80", "90", "100")


def find_tool(name: str) -> str | None:
    """Find cmake or ninja: the build environment's own package first, then the PATH."""
    try:
        package = importlib.import_module(name)
    except ImportError:
        return shutil.which(name)
    folder = getattr(package, "CMAKE_BIN_DIR", None) or getattr(package, "BIN_DIR", "")
    return shutil.which(name, path=folder) or shutil.which(name)


def find_compiler() -> str | None:
    """Find the C++ compiler that CMake would take."""
    given = os.environ.get("CXX")
    if given:
        return shutil.which(shlex.split(given)[0])
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def find_nvcc() -> str | None:
    """Find nvcc: CUDACXX, the PATH, CUDA_HOME, then the usual folder."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    names = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def plan() -> str:
    """Decide what to build: "python", "cpu" or "cuda".

    Raises:
        SystemExit: DINOFAST_BUILD asks for something unknown, or for what a missing tool prevents.
    """
    wanted = os.environ.get("DINOFAST_BUILD", "").strip().lower()
    if wanted not in ("", *MODULES):
        raise SystemExit(f"DINOFAST_BUILD={wanted}: unknown; one of {', '.join(MODULES)}, or unset")
    if wanted == "python":
        return "python"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    found = {
        "a system other than Windows (use WSL)": platform.system() != "Windows",
        "a C++ compiler (install g++ or set CXX)": find_compiler(),
        "cmake (pip install cmake)": find_tool("cmake"),
        "ninja (pip install ninja)": find_tool("ninja"),
        "pybind11 (pip install pybind11)": importlib.util.find_spec("pybind11"),
        f"Python's headers ({headers})": headers.exists(),
    }
    nvcc = find_nvcc()
    if wanted == "cuda":
        found["nvcc (install the CUDA toolkit or set CUDACXX)"] = nvcc
    missing = [name for name, there in found.items() if not there]
    if not missing:
        return wanted or ("cuda" if nvcc else "cpu")
    if wanted:
        raise SystemExit(f"DINOFAST_BUILD={wanted}: not found: {'; '.join(missing)}")
    print(f"dinofast: not found: {'; '.join(missing)}. No native kernels: everything works, but slower.")
    return "python"


def cuda_archs(nvcc: str) -> str:
    """Give CMAKE_CUDA_ARCHITECTURES: machine code for each architecture, PTX of the newest."""
    given = os.environ.get("DINOFAST_CUDA_ARCHS", "").replace(",", ";").strip(";")
    if given:
        archs = [arch.strip() for arch in given.split(";")]
    else:
        known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
        archs = [arch for arch in ARCHS if f"sm_{arch}" in known.split()]
    newest = max(archs, key=lambda arch: int("".join(filter(str.isdigit, arch))))
    return ";".join([*(f"{arch}-real" for arch in archs), f"{newest}-virtual"])


def cmake_build(mode: str) -> Path:
    """Configure and build csrc/; an unchanged tree costs one run of ninja. Give the folder of the modules."""
    import pybind11

    sanitize = os.environ.get("DINOFAST_SANITIZE", "")
    kind = f"{mode}-{sanitize}" if sanitize else mode
    folder = ROOT / "build" / f"{kind}-{sys.implementation.cache_tag}-{platform.machine()}"
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    command = [
        cmake, "-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DDINOFAST_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
        f"-DDINOFAST_SANITIZE={sanitize}",
        f"-DDINOFAST_CUDA={'ON' if mode == 'cuda' else 'OFF'}",
    ]  # fmt: skip
    if mode == "cuda":
        nvcc = find_nvcc()
        command += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={cuda_archs(nvcc)}"]
    try:
        subprocess.run(command, check=True)
        subprocess.run([cmake, "--build", str(folder)], check=True)
    except subprocess.CalledProcessError as error:
        easier = "cpu" if mode == "cuda" else "python"
        raise SystemExit(
            f"dinofast: building the native kernels failed, see above. DINOFAST_BUILD={easier} builds less."
        ) from error
    return folder


def record(package: Path) -> None:
    """Write how `package` was built, and remove modules of an earlier build that this one does not make."""
    for stale in [*package.glob("_native*.*"), *package.glob("_cuda*.*")]:
        if stale.suffix != ".pyi" and stale.name.split(".")[0] not in MODULES[MODE]:
            stale.unlink()
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build.json").write_text(json.dumps({"build": MODE}) + "\n")


class BuildNative(build_ext):
    """Build every module in one run of CMake and put it inside the package."""

    def run(self) -> None:
        """Build, then let setuptools place the modules."""
        self.cmake_folder = cmake_build(MODE)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Copy one finished module."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self.cmake_folder / target.name, target)


class BuildPython(build_py):
    """Copy the package and record how it was built."""

    def run(self) -> None:
        """Copy the sources, then write the record beside them."""
        super().run()
        record(ROOT / "dinofast" if self.editable_mode else Path(self.build_lib, "dinofast"))


MODE = plan()
setup(
    ext_modules=[Extension(f"dinofast.{name}", sources=[]) for name in MODULES[MODE]],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
