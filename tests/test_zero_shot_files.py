"""AD-DINOv3: classes of images, saved models, and published files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from zero_shot_truth import TAPS, WIDTH, doubles, fitted, images, random, text, truths

from dinofast import models
from dinofast.errors import ArtifactError, InputError
from dinofast.models import zero_shot, zero_shot_maps, zero_shot_training
from dinofast.models.zero_shot import ZeroShot
from dinofast.text_vectors import TextVectors
from dinofast.types import Features

KEYS = json.loads((Path(__file__).parent / "keys" / "ad_dinov3_adapters.json").read_text())["tensors"]


# Classes and their text vectors


def test_features_name_their_class(text_file) -> None:
    model, features = fitted(text_file), images(seed=4)
    lung = images(seed=4, class_name="lung")
    other = model.for_class("lung")
    assert model.classes == ["lung", "object"]
    assert not torch.allclose(model.score(lung).map, model.score(features).map, atol=1e-3)
    assert torch.equal(model.score(lung).map, other.score(features).map)
    assert torch.equal(model.score(lung).score, other.score(lung).score)
    assert torch.equal(model.patch_scores(lung), other.patch_scores(features))
    assert torch.equal(model.global_logits(lung), other.global_logits(features))
    for use in (model.score, model.patch_scores, model.global_logits):
        with pytest.raises(
            InputError, match=r"no text vectors of class 'heart', only of lung, object; choose"
        ):
            use(images(class_name="heart"))
    with pytest.raises(InputError, match="class name '': give a noun"):
        model.for_class("")


def test_the_class_of_a_batch_is_trained_on(text_file) -> None:
    named = ZeroShot("object", text_file, TAPS, n_epochs=2).fit([images(class_name="lung")])
    meant = ZeroShot("lung", text_file, TAPS, n_epochs=2).fit([images()])
    for part in zero_shot_training.NAMES:
        assert torch.equal(named.state()[part], meant.state()[part])


def test_classes_are_added_without_another_fit(text_file, tmp_path) -> None:
    model = fitted(text_file)
    before = model.score(images())
    more = TextVectors({"heart": F.normalize(random(2, WIDTH, seed=3), dim=1)}, "0" * 64, "a toy")
    assert model.add_text(more) is model
    assert model.classes == ["lung", "object", "heart"]
    assert torch.equal(model.score(images()).map, before.map)
    model.for_class("heart").save(tmp_path / "heart")
    assert torch.equal(
        models.load(tmp_path / "heart").score(images()).map, model.score(images(class_name="heart")).map
    )
    more.save(tmp_path / "more")
    assert model.add_text(tmp_path / "more").classes == ["lung", "object", "heart"]
    with pytest.raises(InputError, match=r"text vectors of another tower: a toy has the sha256 1{12}.*tower"):
        model.add_text(text(tower="1"))
    with pytest.raises(InputError, match="not fitted"):
        ZeroShot().add_text(more)


def test_a_loaded_model_needs_no_text_file(text_file, tmp_path) -> None:
    model = fitted(text_file)
    model.save(tmp_path / "a")
    Path(text_file).unlink()
    assert torch.equal(models.load(tmp_path / "a").score(images()).map, model.score(images()).map)
    with pytest.raises(InputError, match="no such file"):
        models.load(tmp_path / "a").fit([images()])


def test_the_text_matrix_is_computed_once_a_class(text_file, monkeypatch) -> None:
    calls = []
    compute = zero_shot_maps.text_matrix
    monkeypatch.setattr(zero_shot.maps, "text_matrix", lambda *a: calls.append(1) or compute(*a))
    model = fitted(text_file)
    calls.clear()
    for _ in range(3):
        model.score(images())
        model.patch_scores(images())
        model.score(images(class_name="lung"))
    assert len(calls) == 2
    before = model.score(images()).map
    model.fit([images(seed=8)])
    calls.clear()
    assert not torch.equal(model.score(images()).map, before)
    assert len(calls) == 1


# Published checkpoints


def published(scale: int = 1, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """A file of the published names and shapes, smaller by `scale`, with random values."""
    draw = torch.Generator().manual_seed(seed)
    return {
        part: {
            name: torch.randn([n // scale for n in shape], generator=draw) / math.sqrt(shape[1] // scale)
            for name, shape in tensors.items()
        }
        for part, tensors in KEYS.items()
    }


def test_a_published_checkpoint_scores_as_the_published_code_does(tmp_path) -> None:
    tensors = published()
    torch.save(tensors, tmp_path / "99.pth")
    model = ZeroShot.from_published(tmp_path / "99.pth", text(768), "lung")
    assert (model.n_channels, model.n_taps, model.compat) == (4096, 4, "ad-dinov3")
    features = Features(random(1, 3, 3, 4096), random(1, 4096, seed=1), (20, 20))
    weights = {
        ours: np.stack([tensors[part][f"{i}.fc1.0.weight"].double().numpy() for i in range(count)])
        for part, ours, count in (
            ("patch_token_adapter", "patch_adapter", 4),
            ("cls_token_adapter", "cls_adapter", 4),
            ("prompt_adapter", "text_adapter", 2),
        )
    }
    (expected,) = truths(weights, features, [doubles(text(768).vectors)["lung"]], interleaved=True)
    np.testing.assert_allclose(model.score(features).map[0], expected.map, atol=1e-4)
    np.testing.assert_allclose(model.global_logits(features)[0], expected.logits, rtol=1e-4, atol=1e-3)
    model.save(tmp_path / "ours")
    loaded = models.load(tmp_path / "ours")
    assert torch.equal(loaded.score(features).map, model.score(features).map)


def test_text_vectors_come_from_a_file_or_an_object(tmp_path) -> None:
    torch.save(published(32), tmp_path / "99.pth")
    text(24).save(tmp_path / "text")
    features = Features(random(1, 3, 3, 128), random(1, 128, seed=1), (20, 20))
    first = ZeroShot.from_published(tmp_path / "99.pth", tmp_path / "text", image_score="max")
    second = ZeroShot.from_published(tmp_path / "99.pth", text(24), image_score="max")
    assert torch.equal(first.score(features).score, second.score(features).score)
    assert (first.text, second.text) == (str(tmp_path / "text"), None)
    with pytest.raises(InputError, match=r"99.pth: .*of 24 channels, those of a toy have 25; .*own tower"):
        ZeroShot.from_published(tmp_path / "99.pth", text(25))
    with pytest.raises(InputError, match="no text vectors of class 'heart', only of lung, object"):
        ZeroShot.from_published(tmp_path / "99.pth", text(24), "heart")


class Code:
    """What a torch file may not carry here."""


DAMAGES = {
    "two parts": (lambda t: t.pop("prompt_adapter"), "which holds .*this holds cls_token_adapter, patch"),
    "another model": (lambda t: t.clear() or t.update(state_dict={}), "not a checkpoint of AD-DINOv3's"),
    "a tensor missing": (
        lambda t: t["cls_token_adapter"].pop("2.fc1.0.weight"),
        "cls_token_adapter lacks 2.fc1.0.weight; unknown in it: nothing",
    ),
    "an unused one missing": (
        lambda t: t["patch_token_adapter"].pop("0.fc2.0.weight"),
        "patch_token_adapter lacks 0.fc2.0.weight",
    ),
    "no tensors": (lambda t: t["prompt_adapter"].clear(), "prompt_adapter lacks 0.fc1.0.weight"),
    "an unknown one": (
        lambda t: t["prompt_adapter"].update(bias=torch.zeros(3)),
        "lacks nothing; unknown in it: bias",
    ),
    "a third text": (
        lambda t: t["prompt_adapter"].update({f"2.fc{i}.0.weight": torch.zeros(24, 24) for i in (1, 2)}),
        r"prompt_adapter is \(3, 24, 24\)",
    ),
    "another shape": (
        lambda t: t["patch_token_adapter"].update({"1.fc1.0.weight": torch.zeros(24, 31)}),
        r"1.fc1.0.weight is \(24, 31\), beside 0.fc1.0.weight \(24, 32\) it must be \(24, 32\)",
    ),
    "an unused one of another shape": (
        lambda t: t["patch_token_adapter"].update({"1.fc2.0.weight": torch.zeros(24, 32)}),
        r"1.fc2.0.weight is \(24, 32\), .* it must be \(32, 24\)",
    ),
    "three taps of class tokens": (
        lambda t: [t["cls_token_adapter"].pop(f"3.fc{i}.0.weight") for i in (1, 2)],
        r"adapters differ, \(4, 24, 32\) and \(3, 24, 32\)",
    ),
    "NaN": (lambda t: t["prompt_adapter"]["1.fc1.0.weight"].fill_(torch.nan), "1.fc1.0.weight holds NaN"),
    "not tensors": (
        lambda t: t["prompt_adapter"].update({"0.fc1.0.weight": 3}),
        "not a dictionary of tensors",
    ),
    "not dictionaries": (lambda t: t.update(prompt_adapter=[]), "not a dictionary of tensors"),
    "code": (lambda t: t.update(prompt_adapter=Code()), "torn, or not a torch file of plain tensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_another_checkpoint_is_refused(damage, tmp_path) -> None:
    spoil, message = DAMAGES[damage]
    tensors = published(32)
    spoil(tensors)
    torch.save(tensors, tmp_path / "odd.pth")
    with pytest.raises(ArtifactError, match=f"odd.pth: .*{message}"):
        ZeroShot.from_published(tmp_path / "odd.pth", text(24))


def test_a_file_that_is_no_checkpoint_at_all(tmp_path) -> None:
    torch.save(published(32), tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for name, cut in (("torn", content[:-100]), ("half", content[: len(content) // 2]), ("empty", b"")):
        (tmp_path / name).write_bytes(cut)
        with pytest.raises(ArtifactError, match=f"{name}: torn, or not a torch file"):
            ZeroShot.from_published(tmp_path / name, text(24))
    (tmp_path / "words").write_text("not weights at all", encoding="utf-8")
    with pytest.raises(ArtifactError, match="words: torn, or not a torch file"):
        ZeroShot.from_published(tmp_path / "words", text(24))
    for path, reason in ((tmp_path / "absent", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=f"{reason}; give a checkpoint of the published code"):
            ZeroShot.from_published(path, text(24))
    torch.save(torch.zeros(3), tmp_path / "tensor")
    with pytest.raises(ArtifactError, match="this holds Tensor"):
        ZeroShot.from_published(tmp_path / "tensor", text(24))


def test_other_classes_share_what_was_computed(text_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = fitted(text_file), []
    plain = zero_shot_maps.text_matrix
    monkeypatch.setattr(zero_shot_maps, "text_matrix", lambda *args: calls.append(1) or plain(*args))
    other = next(name for name in model.classes if name != model.class_name)
    for seed in range(3):
        model.patch_scores(images(seed=seed, class_name=other))
    assert len(calls) == 1
