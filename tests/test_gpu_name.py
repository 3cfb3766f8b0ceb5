"""Where results of a GPU's runs go."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci/gpu_name.py"


@pytest.mark.skipif(not SCRIPT.exists(), reason="an installed wheel, without .ci/")
@pytest.mark.parametrize(
    ("device", "folder"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("Tesla V100-SXM2/16GB", "tesla-v100-sxm2-16gb"),
    ],
)
def test_a_folder_is_named_after_its_gpu(device, folder):
    assert runpy.run_path(str(SCRIPT))["folder"](device) == folder
