"""A detector and the model it is given: device, D, class tokens, stages of a fit over epochs."""

from __future__ import annotations

import pytest
import torch
from textures import weave

from dinofast import Detector, backbone, models
from dinofast.backbone import Backbone
from dinofast.errors import InputError

NORMAL = [weave(i) for i in range(4)]


@pytest.fixture(scope="module")
def dino() -> Backbone:
    return backbone.load("random:dinov2-small", device="cpu", size=70)


def test_a_fitted_model_goes_to_the_backbones_device(
    lite0: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Detector(lite0).fit(NORMAL).model
    monkeypatch.setattr(Backbone, "device", property(lambda _: torch.device("meta")))
    assert Detector(lite0, model).model.device.type == "meta"


@pytest.mark.needs_cuda
def test_a_model_fitted_on_the_cpu_predicts_on_a_gpu(dino: Backbone) -> None:
    model = Detector(dino).fit(NORMAL).model
    there = backbone.load("random:dinov2-small", size=70, device="cuda", compile=False)
    (found,) = Detector(there, model).predict(NORMAL[0])
    assert model.device.type == "cuda"
    assert found.map.device.type == "cpu"
    assert found.map.max() < 0.01


def test_a_fitted_model_predicts_at_once(lite0: Backbone) -> None:
    fitted = Detector(lite0).fit(NORMAL)
    again = Detector(lite0, fitted.model)
    (one,), (other,) = fitted.predict(weave(9)), again.predict(weave(9))
    assert torch.equal(one.map, other.map)
    assert again.n_images == 0
    with pytest.raises(
        InputError, match=r"D = 232, and random:dinov2-small:0 with layers \[11\] gives D = 384"
    ):
        Detector(backbone.load("random:dinov2-small", device="cpu", size=70), fitted.model)


def test_class_tokens_are_asked_for_before_images_are_read(lite0: Backbone, dino: Backbone) -> None:
    assert dino.has_cls
    assert not lite0.has_cls
    detector = Detector(lite0, "support_kmeans")
    with pytest.raises(
        InputError, match=r"SupportKMeans\(\) needs class tokens, and efficientnet-lite0 has none"
    ):
        detector.fit("absent")
    without = models.create("support_kmeans", match_descriptor="mean_patch")
    assert Detector(lite0, without).fit(NORMAL).n_images == 4
    assert Detector(dino, "support_kmeans").fit(NORMAL).n_images == 4


@pytest.mark.parametrize(
    ("name", "params", "steps"),
    [
        ("dpmm", {"n_components": 3, "n_epochs": 2, "batch_size": 2}, 4),
        ("spatial_ar", {"n_epochs": 3, "hidden": 4, "dilations": 1, "n_layers": 2}, 3),
    ],
)
def test_stages_of_a_fit_over_epochs_are_told_apart(
    dino: Backbone, name: str, params: dict[str, int], steps: int
) -> None:
    told: dict[str, list[tuple[int, int | None]]] = {}
    Detector(dino, models.create(name, **params)).fit(
        NORMAL,
        validation=[weave(9)],
        progress=lambda stage, done, total: told.setdefault(stage, []).append((done, total)),
    )
    assert list(told) == ["check", "fit", "validation", "train"]
    assert {stage: found[-1] for stage, found in told.items()} == {
        "check": (1, 1),
        "fit": (4, 4),
        "validation": (1, 1),
        "train": (steps, steps),
    }
