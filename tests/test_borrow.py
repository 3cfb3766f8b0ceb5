"""The environment that GPU stages and .ci/setup put over a Python with a torch of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

BORROW = Path(__file__).parents[1] / ".ci/borrow"


@pytest.mark.skipif(not BORROW.exists(), reason="an installed wheel, without .ci/")
@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="this Python is no environment")
def test_an_environment_over_an_environment_sees_its_packages(tmp_path):
    subprocess.run([BORROW, sys.executable, tmp_path / "venv"], check=True, timeout=300)
    code = "import pip, sys, torch; print(sys.prefix, torch.__file__)"
    run = subprocess.run(
        [tmp_path / "venv/bin/python", "-c", code], check=True, capture_output=True, text=True, timeout=300
    )
    prefix, file = run.stdout.split()
    assert Path(prefix) == tmp_path / "venv"
    assert not Path(file).is_relative_to(tmp_path)
