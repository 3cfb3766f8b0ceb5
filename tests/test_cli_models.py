"""The command line for every model: epochs, masks, texts, published checkpoints, packaged sets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import LITE, Call
from textures import save, spoiled, weave
from torch import nn
from torch.nn import functional as F

from dinofast import Detector, trial
from dinofast.backbone import text as towers
from dinofast.data import Sample, packaged
from dinofast.data.split import SplitSet
from dinofast.errors import InputError
from dinofast.models.spatial_ar import SpatialAR
from dinofast.models.zero_shot import ZeroShot
from dinofast.text_vectors import TextVectors

DINO = ("--backbone", "random:dinov2-small", "--size", "70")
BRIEF = (
    *("--model", "spatial_ar", "--param", "n_epochs=3", "--param", "hidden=4"),
    *("--param", "dilations=1", "--param", "n_layers=2"),
)


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    pair = F.normalize(torch.randn(2, 16, generator=torch.Generator().manual_seed(5)), dim=1)
    path = tmp_path / "text.safetensors"
    TextVectors({"cloth": pair}, "0" * 64, "a toy").save(path)
    return path


# Epochs


def test_a_fit_over_epochs_shows_them_chooses_by_validation_and_goes_on(
    call: Call, tree: Path, tmp_path: Path
) -> None:
    saved, kept = tmp_path / "d.safetensors", tmp_path / "run"
    args = ("fit", tree / "train", *LITE, *BRIEF, "--out", saved, "--checkpoint", kept)
    fit = call(*args, "--validation", tree / "test" / "good")
    assert fit.code == 0, fit.err
    assert re.findall(r"(\w+): (\d+) to do", fit.err) == [
        ("check", "4"), ("check", "3"), ("fit", "4"), ("validation", "3"), ("train", "3"),
    ]  # fmt: skip
    assert "train: 3 of 3 in" in fit.err
    first = Detector.load(saved).model.state()
    assert kept.is_file()
    again = call(*args, "--validation", tree / "test" / "good", "--json")
    assert (again.code, again.err) == (0, "")
    assert all(torch.equal(Detector.load(saved).model.state()[n], t) for n, t in first.items())
    other = call(*args)
    assert other.code == 1
    assert "is the checkpoint of another run (validation differ)" in other.err


@pytest.mark.parametrize("option", ["--validation", "--checkpoint"])
def test_options_of_epochs_are_refused_for_others(
    call: Call, tree: Path, tmp_path: Path, option: str
) -> None:
    found = call("fit", tree / "train", *LITE, "--out", tmp_path / "d", option, tree / "test" / "good")
    assert found.code == 1
    assert "for models trained over epochs; memory_bank is not one" in found.err
    assert not (tmp_path / "d").exists()


# Masks and texts


def test_a_model_that_learns_from_masks_takes_labeled_folders(
    call: Call, tree: Path, vectors: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "d.safetensors"
    params = ("--param", f"text={vectors}", "--param", "class_name=cloth", "--param", "n_epochs=2")
    args = ("fit", tree, *DINO, "--layers", "2,5,8,11", "--model", "zero_shot", *params, "--out", saved)
    for i in range(3):
        save(tmp_path / "others" / f"{i}.png", weave(40 + i))
    found = call(*args, "--validation", tree, "--calibrate", tmp_path / "others", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["images"] == 10
    assert json.loads(found.out)["thresholds"]["pixel"]["n_images"] == 3
    assert json.loads(call("evaluate", saved, tree, "--json").out)["pixel"]["n_anomalous"] == 3 * 32 * 32
    for option, message in (
        (("--cross-fit", 2), "--cross-fit scores the images of the fit"),
        (("--rotate",), "--rotate turns images alone"),
    ):
        refused = call(*args, *option)
        assert refused.code == 2
        assert message in " ".join(refused.err.replace("│", " ").split())
    for path in (tree / "ground_truth" / "stain").iterdir():
        path.unlink()
    (tree / "ground_truth" / "stain").rmdir()
    (tree / "ground_truth").rmdir()
    refused = call(*args)
    assert refused.code == 1
    assert f"{tree}: has no ground_truth, and zero_shot learns from masks" in refused.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*LITE, "--model", "support_kmeans"), "or --param match_descriptor=mean_patch, which needs none"),
        (
            (*DINO, "--model", "zero_shot"),
            "`dinofast text TOWER object --out FILE`, and give --param text=FILE",
        ),
        ((*LITE, "--model", "zero_shot", "--param", "text=absent"), "has none; give a DINOv2 or DINOv3 with"),
        ((*LITE, "--param", "masking=true"), "give --param mask_threshold=VALUE"),
    ],
)
def test_what_a_model_lacks_is_named_with_its_option(
    call: Call, tree: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    found = call("fit", tree, "--out", tmp_path / "d", *options)
    assert found.code == 1
    assert message in found.err
    assert "check:" not in found.err
    assert not (tmp_path / "d").exists()


def test_masks_of_a_dinov2_need_no_threshold(call: Call, tree: Path, tmp_path: Path) -> None:
    saved = tmp_path / "d.safetensors"
    found = call("fit", tree / "train", *DINO, "--param", "masking=true", "--out", saved, "--json")
    assert found.code == 0, found.err
    assert Detector.load(saved).model.params()["mask_threshold"] == 10


def test_text_writes_the_vectors_of_a_tower(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tower:
        def __init__(self, source: str) -> None:
            self.source = source

        def vectors(self, names: list[str]) -> TextVectors:
            return TextVectors({name: torch.eye(2, 8) for name in names}, "ab" * 32, self.source)

    monkeypatch.setattr(towers, "load", Tower)
    out = tmp_path / "text.safetensors"
    found = call("text", "a-tower", "brain", "liver", "--out", out)
    assert (found.code, found.out) == (0, f"brain, liver: D = 8, by a-tower\ntext vectors {out}\n")
    assert TextVectors.load(out).names == ["brain", "liver"]
    said = json.loads(call("text", "a-tower", "brain", "--out", out, "--json").out)
    assert said == {"text": str(out), "classes": ["brain"], "dim": 8, "source": "a-tower", "tower": "ab" * 32}
    assert call("text", "a-tower", "--out", out).code == 2
    monkeypatch.undo()
    absent = call("text", tmp_path / "absent", "brain", "--out", out)
    assert absent.code == 1
    assert "absent: no such folder; give a folder of a CLIP model" in absent.err


# Published checkpoints


def adapters(path: Path, taps: int = 4, channels: int = 384, width: int = 16) -> Path:
    """Write adapters as the published code does."""
    draw = torch.Generator().manual_seed(1)

    def part(count: int, inner: int) -> dict[str, torch.Tensor]:
        shapes = {"fc1": (width, inner), "fc2": (inner, width)}
        return {
            f"{i}.{layer}.0.weight": torch.randn(shape, generator=draw)
            for i in range(count)
            for layer, shape in shapes.items()
        }

    torch.save(
        {
            "patch_token_adapter": part(taps, channels),
            "cls_token_adapter": part(taps, channels),
            "prompt_adapter": part(2, width),
        },
        path,
    )
    return path


def test_published_adapters_become_a_detector(call: Call, vectors: Path, tmp_path: Path) -> None:
    published, out = adapters(tmp_path / "9.pth"), tmp_path / "d.safetensors"
    args = ("import", "zero_shot", published, *DINO, "--layers", "2,5,8,11", "--out", out)
    found = call(*args, "--text", vectors, "--param", "class_name=cloth", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["images"] == 0
    detector = Detector.load(out)
    expected = ZeroShot.from_published(published, vectors, "cloth")
    assert detector.model.params() == expected.params() | {"text": str(vectors)}
    assert all(torch.equal(detector.model.state()[n], t) for n, t in expected.state().items())
    assert detector.backbone.preprocess.resize == "squash"
    save(tmp_path / "a.png", weave(3, (96, 140)))
    predicted = call("predict", out, tmp_path / "a.png", "--out", tmp_path / "maps", "--json")
    assert json.loads(predicted.out)["images"][0]["score"] == pytest.approx(
        next(Detector(detector.backbone, expected).predict(tmp_path / "a.png")).score
    )


def network(path: Path, d: int = 232, hidden: int = 6) -> Path:
    """Write a causal network as the published code does."""
    weights: dict[str, torch.Tensor] = {}
    for number, (i, o) in zip((0, 2), ((d, hidden), (hidden, d)), strict=True):
        layer = nn.Conv2d(i, o, 3)
        weights[f"net.{number}.weight"] = layer.weight.detach()
        weights[f"net.{number}.bias"] = torch.zeros(o)
        mask = torch.tensor([[1.0, 1, 1], [1, float(number > 0), 0], [0, 0, 0]])
        weights[f"net.{number}.mask"] = mask.expand(o, i, 3, 3).clone()
    torch.save({"model_state_dict": weights}, path)
    return path


def test_a_published_network_becomes_a_detector(call: Call, tmp_path: Path) -> None:
    published, out = network(tmp_path / "best.pth"), tmp_path / "d.safetensors"
    args = ("import", "spatial_ar", published, *LITE, "--out", out, "--param", "dilations=2")
    found = call(*args, "--resize", "edge")
    assert found.code == 0, found.err
    assert f"from {published}" in found.out
    detector = Detector.load(out)
    assert isinstance(detector.model, SpatialAR)
    assert detector.model.params()["dilations"] == 2
    assert detector.model.hidden == 6
    assert detector.backbone.preprocess.resize == "edge"
    assert next(detector.predict(weave(1))).map.isfinite().all()
    both = call(*args, "--backward", published)
    assert "direction='mean'" in both.out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("zero_shot",), 2, "zero_shot needs --text FILE"),
        (("zero_shot", "--text", "t", "--backward", "x"), 2, "--backward: not for zero_shot"),
        (("spatial_ar", "--text", "x"), 2, "--text: not for spatial_ar"),
        (("dpmm",), 2, "'dpmm' is not one of"),
        (("zero_shot", "--text", "t", "--param", "n_taps=3"), 1, "no parameter n_taps for an import; it has"),
        (("spatial_ar", "--param", "hidden=3"), 1, "tells hidden itself; leave them out"),
        (("spatial_ar", "--layers", "4"), 1, "D = 232, and efficientnet-lite0 with layers [4]"),
        (("spatial_ar", "--param", "loss=l1"), 1, "unknown loss 'l1'"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported(
    call: Call, tmp_path: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    model, *rest = options
    found = call("import", model, network(tmp_path / "a.pth"), *LITE, "--out", tmp_path / "d", *rest)
    assert found.code == code, found.err
    assert message in " ".join(found.err.replace("│", " ").split())
    assert "Traceback" not in found.err
    assert not (tmp_path / "d").exists()


# Packaged sets


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> SplitSet:
    """A packaged set of weaves, in place of the fetched ones."""

    def sample(name: str, image: Any, label: int) -> Sample:
        return Sample(name, lambda: image, None, label)

    found = SplitSet(
        "br35h", "A citation.", "free", "A note.",
        [sample(f"fit{i}", weave(i), 0) for i in range(5)],
        [sample(f"other{i}", weave(10 + i), 0) for i in range(2)],
        [sample(f"good{i}", weave(20 + i), 0) for i in range(3)]
        + [sample(f"bad{i}", spoiled(30 + i), 1) for i in range(3)],
    )  # fmt: skip
    monkeypatch.setattr(packaged, "load", lambda name, progress=None: found)
    return found


def test_evaluate_runs_a_packaged_set(call: Call, toy: SplitSet, tmp_path: Path) -> None:
    out, saved = tmp_path / "r.json", tmp_path / "d.safetensors"
    args = ("evaluate", "--protocol", "packaged", "br35h")
    found = call(
        *args, "memory_bank", *LITE, "--param", "n_neighbors=2", "--out", out, "--save", saved, "--json"
    )
    assert (found.code, found.err) == (0, "")
    said = json.loads(found.out)
    assert json.loads(out.read_text()) == said
    assert (said["set"], said["level"], said["n_fit"]) == ("br35h", "image", 5)
    assert said["model"] == "MemoryBank(n_neighbors=2)"
    assert said["model_bytes"] == 5 * 36 * 232 * 4
    assert said["evaluation"]["labels"] == [0, 0, 0, 1, 1, 1]
    assert said["evaluation"]["image"]["auroc"] == 1
    assert said["fit_seconds"] > said["fit_model_seconds"] > 0
    again = call(*args, saved)
    assert again.code == 0
    assert "MemoryBank(n_neighbors=2) came fitted, 0.16 MiB" in again.out
    assert re.search(r"│ image │ 1\.0000 │ 1\.0000 │ 1\.0000 +│ 3/3", again.out)
    assert again.out.endswith("source A citation. License: free\nnote: A note.\n")
    few = call(*args, "memory_bank", *LITE, "--shots", 2)
    assert "learned 2 images in " in few.out


def test_packaged_options_that_cannot_be(call: Call, toy: SplitSet, tmp_path: Path) -> None:
    args = ("evaluate", "--protocol", "packaged")
    absent = call(*args, "mvtec", "memory_bank", *LITE)
    assert absent.code == 1
    assert "packaged set 'mvtec': one of br35h, elpv-mono, lung-ct" in absent.err
    flags = (("--skip-bad",), ("--no-regions",))
    for options in (("--masks", "255"), ("--map-size", "240"), ("--set", "brain"), *flags):
        refused = call(*args, "br35h", "memory_bank", *LITE, *options)
        assert refused.code == 2
        assert f"{options[0]}: not of the protocol packaged" in refused.err
    refused = call(*args, "br35h", tmp_path / "d.safetensors", "--shots", 3)
    assert refused.code == 2
    assert "--shots: " in refused.err


def test_a_trial_validates_by_the_calibration_images(toy: SplitSet, lite0: Any, vectors: Path) -> None:
    told: list[str] = []
    model = SpatialAR(n_epochs=2, hidden=4, dilations=1, n_layers=2)
    found = trial.run(Detector(lite0, model), toy, progress=lambda stage, *_: told.append(stage))
    assert list(dict.fromkeys(told)) == ["check", "fit", "validation", "train", "predict"]
    assert found.ranking is found.evaluation.image
    with pytest.raises(InputError, match="zero_shot learns from abnormal ones with masks; give a fitted"):
        trial.run(Detector(lite0, ZeroShot("cloth", str(vectors), n_taps=1)), toy)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("fit", ("--validation", "--checkpoint", "--resize", "ground_truth")),
        ("import", ("zero_shot", "spatial_ar", "--text", "--backward", "--param", "--resize", "squash")),
        ("text", ("TOWER", "CLASS", "--out", "clip-vit-large-patch14-336")),
        ("evaluate", ("packaged", "br35h", "elpv-mono", "lung-ct")),
        ("", ("import", "text")),
    ],
)
def test_help_of_the_models_options(
    call: Call, monkeypatch: pytest.MonkeyPatch, command: str, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    found = call(*filter(None, [command]), "--help")
    assert (found.code, found.err) == (0, "")
    for word in words:
        assert word.lower() in found.out.lower(), word
