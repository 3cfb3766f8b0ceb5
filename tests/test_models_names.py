"""Models by their names: made, listed, read from files."""

import subprocess
import sys

import pytest
import torch

from dinofast import artifact, models
from dinofast.errors import ArtifactError, InputError
from dinofast.models.base import Model
from dinofast.types import Features


def test_names_and_errors_of_create():
    assert "memory_bank" in models.names()
    for name in models.names():
        assert isinstance(models.create(name), Model)
        assert models.create(name).name == name
    with pytest.raises(InputError, match=r"unknown model 'bank'; one of .*memory_bank"):
        models.create("bank")
    with pytest.raises(InputError, match="memory_bank has no parameter kk; its parameters are n_neighbors"):
        models.create("memory_bank", kk=3)


def test_listing_names_loads_nothing_heavy():
    code = "import sys, dinofast; dinofast.models.names(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "names no model"),
        ({"model": "future", "params": {}}, "unknown model 'future'"),
        ({"model": "memory_bank", "params": {"future": 1}}, "no parameter future"),
        ({"model": "memory_bank", "params": {"n_neighbors": "3"}}, "n_neighbors must be"),
        ({"model": "memory_bank", "params": {"n_neighbors": 9}}, "M >= 9"),
    ],
)
def test_file_whose_contents_do_not_fit_is_refused_by_name(tmp_path, config, message):
    artifact.write(tmp_path / "odd", "model", {"bank": torch.ones(2, 3)}, config)
    with pytest.raises(ArtifactError, match=f"odd: .*{message}"):
        models.load(tmp_path / "odd")


def test_class_load_refuses_another_model(tmp_path):
    class Other(Model):
        name = "other"

    models.create("memory_bank").fit([Features(torch.randn(1, 2, 2, 3), None, (8, 8))]).save(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"a: holds a memory_bank, not a other"):
        Other.load(tmp_path / "a")


def test_features_beyond_float32_are_refused():
    batch = Features(torch.full((1, 2, 2, 3), 1e39, dtype=torch.float64), None, (8, 8))
    with pytest.raises(InputError, match="4 of 4 patches hold NaN or infinite features"):
        models.create("memory_bank").fit([batch])
