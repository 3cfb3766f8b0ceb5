"""Who may import whom: every import of the package is read, and an arrow that points up fails."""

import ast
from pathlib import Path

import pytest

import dinofast

PACKAGE = Path(dinofast.__file__).parent
LEAVES = {"types", "errors", "files"}
MAY_IMPORT = {
    "types": set(),
    "errors": set(),
    "files": {"errors"},
    "imaging": LEAVES,
    "progress": LEAVES,
    "artifact": LEAVES,
    "ops": {"kernels", "_native", "_cuda", "artifact", "errors", "interop"},
    "testing": {"ops"},
    "metrics": LEAVES,
    "data": LEAVES | {"imaging"},
    "text_vectors": LEAVES | {"artifact"},
    "backbone": LEAVES | {"imaging", "text_vectors"},
    "models": LEAVES | {"ops", "artifact", "interop", "progress", "text_vectors"},
    "calibrate": LEAVES | {"metrics"},
    "stream": LEAVES | {"backbone", "data", "imaging", "progress"},
    "interop": LEAVES,
    "drop_in": LEAVES | {"interop", "models", "ops"},
    "cross_fit": LEAVES | {"data", "imaging", "models", "progress", "stream"},
    "capture": LEAVES | {"backbone", "calibrate", "data", "imaging", "models", "ops", "progress"},
    "detector": LEAVES
    | {"artifact", "backbone", "calibrate", "capture", "cross_fit", "data", "imaging", "models", "progress"}
    | {"stream"},
    "memory_plan": LEAVES | {"artifact", "backbone", "imaging", "models", "ops"},
    "figures": LEAVES,
    "report": LEAVES | {"figures"},
    "evaluate": LEAVES | {"data", "detector", "metrics", "progress"},
    "published": set(),
    "scoreboard": LEAVES | {"calibrate", "evaluate", "metrics", "report"},
    "protocol": LEAVES
    | {"calibrate", "data", "detector", "evaluate", "imaging", "metrics", "models", "progress", "published"}
    | {"scoreboard", "stream"},
    "output": LEAVES | {"data", "detector", "figures", "progress"},
    "info": {"errors", "ops"},
    "demo": LEAVES
    | {"backbone", "calibrate", "data", "detector", "evaluate", "figures", "progress", "report"},
    "console": LEAVES | {"backbone", "data", "detector", "evaluate", "models", "progress"},
    "trial": LEAVES | {"data", "detector", "evaluate", "models", "progress"},
    "packaged_command": LEAVES | {"console", "data", "trial"},
    "fit_command": LEAVES | {"backbone", "console", "data", "detector", "models"},
    "protocol_command": LEAVES | {"console", "data", "metrics", "protocol", "published", "scoreboard"},
    "commands": LEAVES
    | {"backbone", "console", "data", "demo", "detector", "evaluate", "fit_command", "info"}
    | {"memory_plan", "output", "packaged_command", "protocol_command"},
    "cli": {"commands"},
    "kernels": set(),
}
ONLY_HERE = {"_native": "ops/providers/cpu.py", "_cuda": "ops/providers/gpu.py"}
NEVER = {"torchvision", "timm"}

FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts != ("__init__.py",))


def imports(path):
    """Every dotted name that a file imports, relative imports refused."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "dinofast":
                yield from (f"dinofast.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_arrow_points_up(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        assert name.split(".")[0] not in NEVER, f"{name} is never imported"
        if name.startswith("dinofast."):
            other = name.split(".")[1]
            assert other == room or other in MAY_IMPORT[room] or other == "__version__", (
                f"{room} imports {name}"
            )
            if other in ONLY_HERE:
                assert path.relative_to(PACKAGE).as_posix() == ONLY_HERE[other]


def test_only_the_backbone_compiles():
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        uses = any(
            isinstance(n, ast.Attribute) and n.attr == "compile" and ast.unparse(n.value) == "torch"
            for n in ast.walk(tree)
        )
        assert not uses or path.relative_to(PACKAGE).parts[0] == "backbone", path


def test_intrinsics_live_in_the_tile_files_only():
    csrc = PACKAGE.parent / "csrc"
    if not csrc.is_dir():
        pytest.skip("installed without sources")
    for path in csrc.rglob("*"):
        if path.suffix in {".cpp", ".h"} and path.parent.name != "tile":
            assert "immintrin" not in path.read_text(encoding="utf-8"), path
