import json
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dinofast import __version__, artifact
from dinofast.errors import ArtifactError, InputError

TENSORS = {"bank": torch.arange(6.0).view(2, 3), "count": torch.tensor(7), "empty": torch.zeros(0, 4)}
CONFIG = {"z": [1, 2.5, None], "a": {"name": "café", "flag": True}}


def stored(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path, **changes):
    header = json.loads(stored(path)["dinofast"]) | changes
    save_file({"bank": torch.ones(2, 3)}, path, metadata={"dinofast": json.dumps(header)})


def test_everything_comes_back(tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    artifact.write(path, "model", TENSORS, CONFIG)
    tensors, config = artifact.read(path, kind="model")
    assert config == CONFIG
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_dtypes_and_views_come_back(tmp_path, dtype):
    tensor = (torch.randn(6, 8) * 3).to(dtype)[::2, 1:5].T
    artifact.write(tmp_path / "a", "model", {"x": tensor}, {})
    assert torch.equal(artifact.read(tmp_path / "a", kind="model")[0]["x"], tensor)


def test_one_metadata_key_of_sorted_json(tmp_path):
    artifact.write(tmp_path / "a", "model", TENSORS, CONFIG)
    metadata = stored(tmp_path / "a")
    assert list(metadata) == ["dinofast"]
    header = json.loads(metadata["dinofast"])
    assert metadata["dinofast"] == json.dumps(header, sort_keys=True)
    assert header["schema_version"] == artifact.SCHEMA_VERSION
    assert header["dinofast_version"] == __version__
    assert header["kind"] == "model"


def test_same_content_same_bytes(tmp_path):
    artifact.write(tmp_path / "a", "model", TENSORS, CONFIG)
    artifact.write(tmp_path / "b", "model", dict(reversed(TENSORS.items())), dict(reversed(CONFIG.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_overwritten_in_place_does_not_change_what_was_read(tmp_path):
    path = tmp_path / "a"
    artifact.write(path, "model", {"bank": torch.zeros(1 << 20)}, {})
    tensors, _ = artifact.read(path, kind="model")
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\x7f" * 100_000)
    assert not tensors["bank"].any()


@pytest.mark.parametrize("keep", [0, 5, 60, -100, -1])
def test_torn_file_is_refused(tmp_path, keep):
    path = tmp_path / "torn.safetensors"
    artifact.write(path, "model", {"bank": torch.ones(50, 3)}, CONFIG)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"torn\.safetensors: torn or not a dinofast file .*again"):
        artifact.read(path, kind="model")


@pytest.mark.parametrize(
    "content", [b"\x89PNG\r\n\x1a\n" + b"\0" * 99, b"just some text, long enough", b"PK\3\4"]
)
def test_file_of_another_format_is_refused(tmp_path, content):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="foreign: torn or not a dinofast file"):
        artifact.read(path, kind="model")


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"dinofast": "no json"}, {"dinofast": "[1]"}, {"dinofast": "{}"}]
)
def test_safetensors_of_others_are_refused(tmp_path, metadata):
    path = tmp_path / "foreign"
    save_file({"x": torch.ones(3)}, path, metadata=metadata)
    with pytest.raises(ArtifactError, match="foreign: a safetensors file, but not one of dinofast's"):
        artifact.read(path, kind="model")


@pytest.mark.parametrize("change", [{"schema_version": "1"}, {"config": [1]}])
def test_broken_header_is_refused(tmp_path, change):
    artifact.write(tmp_path / "a", "model", {}, {})
    rewrite(tmp_path / "a", **change)
    with pytest.raises(ArtifactError, match="not one of dinofast's"):
        artifact.read(tmp_path / "a", kind="model")


def test_newer_file_is_refused(tmp_path):
    artifact.write(tmp_path / "a", "model", {}, {})
    rewrite(tmp_path / "a", schema_version=artifact.SCHEMA_VERSION + 1, dinofast_version="9.8")
    with pytest.raises(ArtifactError, match=r"a: written by dinofast 9\.8 in format 2.*Upgrade dinofast"):
        artifact.read(tmp_path / "a", kind="model")


def test_other_kind_is_refused(tmp_path):
    artifact.write(tmp_path / "a", "detector", {}, {})
    with pytest.raises(ArtifactError, match="a: holds a detector, not a model"):
        artifact.read(tmp_path / "a", kind="model")


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(InputError, match="nothing_here: no such file"):
        artifact.read(tmp_path / "nothing_here", kind="model")
    with pytest.raises(InputError, match="is a folder"):
        artifact.read(tmp_path, kind="model")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, torch.ones(1)])
def test_configuration_that_is_not_json_is_refused(tmp_path, value):
    with pytest.raises(InputError, match="is not JSON"):
        artifact.write(tmp_path / "a", "model", {}, {"value": value})
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    artifact.write(path, "model", TENSORS, CONFIG)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(InputError, match=r"a: cannot be written .*space"):
            artifact.write(path, "model", {"bank": torch.ones(1 << 16)}, CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == before


def test_parent_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        artifact.write(tmp_path / "file" / "a", "model", TENSORS, CONFIG)


def test_tensors_that_share_memory_come_back(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    shared = {"a": whole, "b": whole, "c": whole[0], "d": whole[1], "e": torch.ones(0), "f": torch.ones(0)}
    artifact.write(tmp_path / "a", "model", shared, {})
    found, _ = artifact.read(tmp_path / "a", kind="model")
    assert found.keys() == shared.keys()
    for name, tensor in shared.items():
        assert torch.equal(found[name], tensor)
