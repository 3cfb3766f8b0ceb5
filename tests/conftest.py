"""Fixtures: a GPU only where promised, no leaking seeds, NaN-filled fresh memory; the command line."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from command_line import Call, Result
from cupy_stand_in import gpu  # noqa: F401  (a fixture)

from dinofast.ops.providers import instruction_set

try:
    from dinofast import _native
except ImportError:
    ISAS = []  # built without native kernels: the tests of instruction sets are skipped
else:
    ISAS = _native.available_isas()

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # without it torch refuses products on a GPU below

INDETERMINATE = pytest.mark.filterwarnings(
    "ignore:.*does not have a deterministic implementation:UserWarning"
)
"""What torch says of some operators on a GPU, see `_nan_filled_memory`."""

collect_ignore = [] if importlib.util.find_spec("anomalib") else ["hosts"]
"""Tests in real host projects need an environment of their own: make test-hosts."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests whose GPU or package index is not there, unless it was promised: then they must fail.

    DINOFAST_REQUIRE_CUDA=1 and DINOFAST_REQUIRE_NETWORK=1 are the promises. Where there is a GPU, tests
    without the marker use it too, by the device "auto".
    """
    if torch.cuda.is_available():
        for item in items:
            item.add_marker(INDETERMINATE)
    absent = {}
    if not torch.cuda.is_available() and os.environ.get("DINOFAST_REQUIRE_CUDA") != "1":
        absent["needs_cuda"] = "no GPU"
    fetching = any("network" in item.keywords for item in items)
    if fetching and os.environ.get("DINOFAST_REQUIRE_NETWORK") != "1" and (problem := _index_problem()):
        absent["network"] = problem
    for item in items:
        for marker, reason in absent.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def _index_problem() -> str:
    """Ask the package index for one small page; tell why it cannot be asked, or nothing."""
    if importlib.util.find_spec("pypi_simple") is None:
        return "pypi-simple is not installed"
    from pypi_simple import PyPISimple

    try:
        with PyPISimple() as index:
            index.get_project_page("pypi-simple", timeout=5)
    except OSError:
        return "the package index does not answer"
    return ""


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force each instruction set of this processor in turn."""
    monkeypatch.setenv("DINOFAST_ISA", request.param)
    assert instruction_set() == request.param
    return request.param


@pytest.fixture
def restored_threads():
    """Put back the number of threads that the test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _contained_randomness():
    """Seed torch, and put back what the test leaves."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """Fill memory from torch.empty with NaN, so that an unwritten result fails.

    DINOFAST_INITCHECK=1 leaves it as it is, for a tool that looks for reads of it.
    """
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = os.environ.get("DINOFAST_INITCHECK") != "1"
    torch.use_deterministic_algorithms(
        True, warn_only=torch.cuda.is_available()
    )  # a GPU lacks some, as cumsum
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before[0]
    torch.use_deterministic_algorithms(before[1])


@pytest.fixture(scope="session")
def lite0():
    """The smallest backbone with real weights: 6 x 6 patches of an image of 96 x 96, about 10 ms each."""
    from dinofast import backbone

    return backbone.load("efficientnet-lite0", size=96, device="cpu")


@pytest.fixture
def fitted(lite0):
    """A detector of four pictures of cloth."""
    from textures import weave

    from dinofast import Detector

    return Detector(lite0).fit([weave(i) for i in range(4)])


@pytest.fixture
def detector(fitted, tmp_path: Path) -> Path:
    """The file of `fitted`."""
    fitted.save(tmp_path / "fitted.safetensors")
    return tmp_path / "fitted.safetensors"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the command line here, as the installed script would."""
    from dinofast import cli

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["dinofast", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        code = stop.value.code
        return Result(code if isinstance(code, int) else 0 if code is None else 1, out, err)

    return run


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """MVTec's layout with masks: see `textures.cloth_tree`."""
    from textures import cloth_tree

    return cloth_tree(tmp_path / "cloth")


@pytest.fixture(scope="session")
def brain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of BMAD's brain images: see `bmad_trees.bmad_tree`."""
    from bmad_trees import bmad_tree

    return bmad_tree(tmp_path_factory.mktemp("brain"))


@pytest.fixture(scope="session")
def report(brain: Path, lite0):
    """What the BMAD protocol says of a memory bank on `brain`."""
    from dinofast import Detector, protocol
    from dinofast.data import bmad

    return protocol.run(Detector(lite0), bmad.load(brain))


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    """The file of `zero_shot_truth.text`."""
    from zero_shot_truth import text

    text().save(tmp_path / "text")
    return str(tmp_path / "text")
