"""Saving a detector and loading it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from textures import weave

from dinofast import Detector, artifact, backbone, imaging, models
from dinofast.backbone import Backbone
from dinofast.errors import ArtifactError, InputError
from dinofast.types import Features

NORMAL = [weave(i) for i in range(4)]
OTHERS = [weave(i) for i in range(10, 14)]


def test_the_same_detector_gives_the_same_bytes(lite0: Backbone, tmp_path: Path) -> None:
    for name in ("a", "b"):
        detector = Detector(lite0).fit(NORMAL)
        detector.calibrate(OTHERS)
        detector.save(tmp_path / name)
    whole = (tmp_path / "a").read_bytes()
    assert (tmp_path / "b").read_bytes() == whole
    loaded = Detector.load(tmp_path / "a", backbone=lite0)
    loaded.save(tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == whole
    assert loaded.n_images == 4
    for one, other in zip(detector.predict(OTHERS), loaded.predict(OTHERS), strict=True):
        assert torch.equal(one.map, other.map)


def test_the_backbone_is_found_again(lite0: Backbone, tmp_path: Path) -> None:
    Detector(lite0).fit(NORMAL).save(tmp_path / "d")
    for again in (None, "efficientnet-lite0"):
        loaded = Detector.load(tmp_path / "d", backbone=again, device="cpu")
        assert loaded.backbone is not lite0
        assert loaded.backbone.config == lite0.config


def test_a_model_fitted_elsewhere_can_be_saved(lite0: Backbone, tmp_path: Path) -> None:
    model = models.create("memory_bank").fit([lite0(lite0.preprocess(NORMAL[0])[None])])
    Detector(lite0, model).save(tmp_path / "d")
    loaded = Detector.load(tmp_path / "d", backbone=lite0)
    assert loaded.calibrate(NORMAL[1]).n_images == 1


def test_saving_is_whole_or_not_at_all(
    fitted: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "d.safetensors"
    fitted.save(path)
    before = path.read_bytes()

    def torn(tensors: Any, temporary: Path, **_: Any) -> None:
        Path(temporary).write_bytes(before[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "save_file", torn)
    fitted.calibrate(OTHERS)
    with pytest.raises(InputError, match=rf"{path}: cannot be written \(No space left on device\)"):
        fitted.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Write a detector file again after `change` of its tensors and config."""
    tensors, config = artifact.read(path, kind="detector")
    change(tensors, config)
    artifact.write(path, "detector", tensors, config)


def newer(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'\\"schema_version\\": 1', b'\\"schema_version\\": 7'))
    assert path.read_bytes() != raw


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.unlink(), "no such file; give the path of a detector"),
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), "torn or not a dinofast file"),
        (lambda p: p.write_bytes(p.read_bytes()[: len(p.read_bytes()) // 2]), "torn or not a dinofast file"),
        (lambda p: p.write_bytes(b""), "torn or not a dinofast file"),
        (lambda p: p.write_text("pickle"), "torn or not a dinofast file"),
        (newer, "format 7; this is dinofast .* Upgrade dinofast"),
        (lambda p: models.create("memory_bank").fit([GRID]).save(p), "holds a model, not a detector"),
        (
            lambda p: rewritten(p, lambda t, c: c.pop("backbone")),
            "does not hold together .*save the detector",
        ),
        (lambda p: rewritten(p, lambda t, c: c.pop("fit")), "does not hold together"),
        (lambda p: rewritten(p, lambda t, c: c.update(thresholds=3)), "does not hold together"),
        (lambda p: rewritten(p, lambda t, c: c["backbone"].update(dtype="float9")), "does not hold together"),
        (
            lambda p: rewritten(p, lambda t, c: c.update(model={"model": "none", "params": {}})),
            "unknown model",
        ),
        (lambda p: rewritten(p, lambda t, c: t.pop("model.bank")), "a memory bank holds one tensor"),
        (
            lambda p: rewritten(p, lambda t, c: t.update({"model.bank": t["model.bank"][:, :7].clone()})),
            "D = 7",
        ),
    ],
)
def test_what_is_no_whole_detector_is_refused(
    fitted: Detector, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "d.safetensors"
    fitted.save(path)
    spoil(path)
    with pytest.raises((ArtifactError, InputError), match=f"{path}: .*{message}"):
        Detector.load(path, backbone=fitted.backbone)


GRID = Features(torch.ones(1, 4, 4, 8), None, (64, 64))


def test_another_backbone_is_refused_by_name(fitted: Detector, tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    fitted.save(path)
    for other, message in (
        ({"size": 64}, "size 96 in the file, 64 here"),
        ({"size": 96, "resize": "squash"}, "resize 'edge' in the file, 'squash' here"),
        ({"size": 96, "layers": (4, 7)}, r"layers \[4, 7, 10\] in the file, \[4, 7\] here"),
    ):
        found = backbone.load("efficientnet-lite0", device="cpu", **other)  # type: ignore[arg-type]
        said = f"{path}: was fitted with efficientnet-lite0, .*{message}.*or fit again"
        with pytest.raises(ArtifactError, match=said):
            Detector.load(path, backbone=found)


def test_other_weights_of_the_same_network_are_refused(tmp_path: Path) -> None:
    first, second = (backbone.load(f"random:dinov2-small:{i}", size=28, device="cpu") for i in range(2))
    path = tmp_path / "d.safetensors"
    Detector(first).fit(NORMAL[:1]).save(path)
    with pytest.raises(ArtifactError, match=r"random:dinov2-small:0.* fingerprint '.*' in the file"):
        Detector.load(path, backbone=second)
    assert Detector.load(path, device="cpu").backbone.fingerprint == first.fingerprint


def test_the_file_names_what_made_it(fitted: Detector, tmp_path: Path) -> None:
    fitted.save(tmp_path / "d.safetensors")
    tensors, config = artifact.read(tmp_path / "d.safetensors", kind="detector")
    seen = tensors["seen"].tolist()
    assert seen == sorted(list(imaging.digest(image)) for image in NORMAL)
    assert config["backbone"]["license"] == "Apache-2.0"
    assert config["backbone"]["mean"] == [0.485, 0.456, 0.406]
    assert config["seed"] == 0
    assert config["torch_version"] == torch.__version__
    raw = (tmp_path / "d.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert list(header["__metadata__"]) == ["dinofast"]
