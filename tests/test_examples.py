"""Every script in examples/ runs and agrees with its host."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {  # packages without which a script is skipped, largest difference
    "anomalib_models.py": (("anomalib", "torchvision", "timm"), 1e-5),
    "anomalydino.py": (("faiss", "cv2", "scipy"), 1e-5),
    "faiss_search.py": (("faiss",), 1e-3),
    "fastkmeans_clusters.py": (("fastkmeans",), 1e-3),
    "flash_kmeans_batch.py": (("flash_kmeans",), 1e-3),
    "patchcore.py": (("faiss",), 1e-3),
    "sklearn_neighbors.py": (("sklearn",), 1e-3),
}
SCRIPTS = sorted({path.name for path in EXAMPLES.glob("*.py")} - {"side_by_side.py"})
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="examples/ is not beside the tests")


def run(script):
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(EXAMPLES / script)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def test_every_example_is_listed():
    assert set(re.findall(r"`(\w+\.py)`", (EXAMPLES / "README.md").read_text())) == set(SCRIPTS) >= set(NEEDS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_example_agrees_with_its_host(script):
    packages, tolerance = NEEDS.get(script, ((), 1e-4))
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    done = run(script)
    assert done.returncode == 0, done.stderr
    differences = [float(d) for d in re.findall(r"largest difference\D*?([\d.e+-]+)", done.stdout)]
    assert differences, done.stdout
    assert max(differences) <= tolerance
    assert "host" in done.stdout
    assert "dinofast" in done.stdout


@pytest.mark.parametrize(
    ("script", "how"),
    [
        ("anomalib_models.py", "make test-hosts"),
        ("fastkmeans_clusters.py", "pip install fastkmeans"),
        ("flash_kmeans_batch.py", "pip install flash-kmeans"),
    ],
)
def test_without_the_host_an_example_says_how_to_set_it_up(script, how):
    host = NEEDS[script][0][0]
    if importlib.util.find_spec(host) is not None:
        pytest.skip(f"{host} is installed")
    done = run(script)
    assert done.returncode == 1
    assert how in done.stderr
