"""Every way of loading a backbone, and what is refused."""

from __future__ import annotations

import dataclasses
import logging
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from official_vit import checkpoint, shallow
from torch import Tensor

from dinofast.backbone import hub, load, official
from dinofast.errors import BackboneError, InputError


@pytest.mark.parametrize(
    "bad",
    [{"compile": "fastest"}, {"dtype": torch.float64},
     {"device": "nowhere"}, {"size": 3}],
)  # fmt: skip
def test_arguments_that_cannot_be_used(bad, monkeypatch):
    with pytest.raises(InputError):
        load(shallow(monkeypatch, "dinov2-small", 1), **{"device": "cpu", **bad})


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    """An empty cache and a hub that refuses connections."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("DINOFAST_BACKBONE", raising=False)
    return tmp_path / "cache"


def cache(folder: Path, repo: str) -> None:
    """Put one-block weights of a DINOv2 where the hub's cache would have them."""
    root = folder / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    small = dataclasses.replace(official.ARCHITECTURES["dinov2-small"], depth=1)
    official.build(official.random_tensors(small, 0), "").save_pretrained(root / "snapshots" / "abc")


def test_auto_takes_efficientnet_when_there_is_no_dino(no_hub):
    backbone = load(device="cpu")
    assert backbone.id == "efficientnet-lite0"
    assert "no DINOv2" in backbone.reason
    assert backbone.reason in backbone.describe()


def test_auto_takes_a_cached_dino_without_connecting(no_hub):
    cache(no_hub, "facebook/dinov2-small")
    backbone = load(device="cpu")
    assert (backbone.id, backbone.kind) == ("facebook/dinov2-small", "dinov2")
    assert "cache" in backbone.reason
    assert backbone.license == "Apache-2.0"


def test_auto_follows_the_environment(no_hub, monkeypatch, tmp_path):
    torch.save(checkpoint("dinov2_vits14", 1), tmp_path / "mine.pth")
    monkeypatch.setenv("DINOFAST_BACKBONE", str(tmp_path / "mine.pth"))
    assert load(device="cpu").id == "mine.pth"
    monkeypatch.setenv("DINOFAST_BACKBONE", str(tmp_path / "absent.pth"))
    with pytest.raises(BackboneError, match=r"absent\.pth"):
        load(device="cpu")


@pytest.mark.parametrize("name", ["dinov2-small", "facebook/dinov3-vits16-pretrain-lvd1689m"])
def test_an_unreachable_hub_names_the_three_ways_at_once(name, no_hub):
    started = time.monotonic()
    with pytest.raises(BackboneError, match=r"(?s)local path.*HF_TOKEN.*HF_ENDPOINT"):
        load(name, device="cpu")
    assert time.monotonic() - started < 15


def test_a_silent_hub_is_not_waited_for(no_hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub, "PROBE_SECONDS", 0.5)
        with pytest.raises(BackboneError, match=r"(?s)timed out.*HF_ENDPOINT"):
            load("dinov2-small", device="cpu")


def test_a_gated_hub_names_the_three_ways(no_hub, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    def refuse(*_, **__):
        raise GatedRepoError.__new__(GatedRepoError)

    assert issubclass(GatedRepoError, HfHubHTTPError)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(BackboneError, match=r"(?s)local path.*HF_TOKEN.*HF_ENDPOINT"):
        load("dinov3-vits16", device="cpu")


def test_the_dinov3_license_is_shown(tmp_path, caplog):
    torch.save(checkpoint("dinov3_vits16", 1), tmp_path / "v3.pth")
    with caplog.at_level(logging.WARNING, logger="dinofast"):
        backbone = load(tmp_path / "v3.pth", device="cpu")
    assert "DINOv3 License" in backbone.license
    assert "DINOv3 License" in caplog.text


@pytest.mark.parametrize(
    "name", ["resnet50", "random:dinov2-tiny", "random:dinov2-small:x", "dinov2-small.pth", "./no"]
)
def test_names_that_do_not_exist(name):
    with pytest.raises(BackboneError, match=name.replace(".", r"\.")):
        load(name, device="cpu")


def broken(kind: str) -> dict[str, Tensor]:
    tensors = checkpoint("dinov2_vits14", 2)
    if kind == "missing":
        del tensors["blocks.1.ls2.gamma"]
    elif kind == "unknown":
        tensors["head.weight"] = torch.zeros(2)
    elif kind == "shape":
        tensors["blocks.0.mlp.fc1.bias"] = torch.zeros(7)
    elif kind == "nan":
        tensors["norm.bias"][3] = float("nan")
    elif kind == "swiglu":
        tensors["blocks.0.mlp.w12.weight"] = torch.zeros(2)
    elif kind == "foreign":
        tensors = {"conv1.weight": torch.zeros(2)}
    elif kind == "nested":
        tensors = {"teacher": tensors}
    return tensors


@pytest.mark.parametrize(
    ("kind", "says"),
    [("missing", "ls2.gamma is missing"), ("unknown", "head.weight is unknown"), ("shape", r"\(7,\), not"),
     ("nan", "norm.bias is not finite"), ("swiglu", "SwiGLU"), ("foreign", "conv1.weight"),
     ("nested", "plain")],
)  # fmt: skip
def test_wrong_weight_files(kind, says, tmp_path):
    torch.save(broken(kind), tmp_path / "odd.pth")
    with pytest.raises(BackboneError, match=rf"(?s)odd\.pth.*{says}"):
        load(tmp_path / "odd.pth", device="cpu")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_torn_weight_files(suffix, tmp_path):
    path = tmp_path / f"torn.{suffix}"
    save = torch.save if suffix == "pth" else safetensors.torch.save_file
    save(checkpoint("dinov2_vits14", 1), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BackboneError, match=r"torn\."):
        load(path, device="cpu")


def test_a_weight_file_never_runs_code(tmp_path):
    torch.save({"cls_token": Path("x")}, tmp_path / "code.pth")
    with pytest.raises(BackboneError, match=r"code\.pth"):
        load(tmp_path / "code.pth", device="cpu")


def test_wrong_folders(tmp_path):
    with pytest.raises(BackboneError, match=r"config\.json"):
        load(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BackboneError, match="bert"):
        load(tmp_path, device="cpu")
    small = dataclasses.replace(official.ARCHITECTURES["dinov2-small"], depth=1)
    official.build(official.random_tensors(small, 0), "").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BackboneError, match="torn"):
        load(tmp_path, device="cpu")
    tensors = safetensors.torch.load(whole)
    del tensors["layernorm.bias"]
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"layernorm\.bias"):
        load(tmp_path, device="cpu")


def test_without_transformers_the_extra_is_named(monkeypatch, no_hub):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackboneError, match=r"dinofast\[hf\]"):
        load("random:dinov2-small", device="cpu")
    with pytest.raises(BackboneError, match=r"dinofast\[hf\]"):
        hub.from_hub("facebook/dinov2-small", None)


def test_loading_efficientnet_imports_no_transformers():
    code = (
        "import sys, dinofast.backbone as b; b.load('efficientnet-lite0', device='cpu');"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
