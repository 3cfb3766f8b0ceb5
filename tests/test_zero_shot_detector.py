"""ZeroShot in a detector: masks on their way from the files to the model, adapters without any fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from textures import save, spoiled, weave
from torch.nn import functional as F

from dinofast import Detector, backbone, data
from dinofast.backbone import Backbone, Preprocess
from dinofast.data import Sample
from dinofast.errors import BadFilesError, InputError
from dinofast.models.zero_shot import ZeroShot
from dinofast.text_vectors import TextVectors
from dinofast.types import Features

BOX = (slice(64, 96), slice(64, 96))
MASK = np.zeros((96, 96), np.bool_)
MASK[BOX] = True


@pytest.fixture(scope="module")
def dino() -> Backbone:
    return backbone.load("random:dinov2-small", device="cpu", size=70, layers=(2, 5, 8, 11))


@pytest.fixture
def model(tmp_path: Path) -> ZeroShot:
    torch.manual_seed(5)
    pair = F.normalize(torch.randn(2, 16), dim=1)
    TextVectors({"cloth": pair}, "0" * 64, "a toy").save(tmp_path / "text")
    return ZeroShot("cloth", str(tmp_path / "text"), n_epochs=12, batch_size=4, learning_rate=1e-3)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Six normal and six spoiled images with masks, in the layout of MVTec AD."""
    root = tmp_path / "cloth"
    for i in range(6):
        save(root / "test" / "good" / f"{i}.png", weave(i))
        save(root / "test" / "spot" / f"{i}.png", spoiled(i + 20, box=BOX))
        mask = root / "ground_truth" / "spot" / f"{i}_mask.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(MASK).save(mask)
    return root


def test_it_learns_from_a_tree_with_masks(
    dino: Backbone, model: ZeroShot, tree: Path, tmp_path: Path
) -> None:
    detector = Detector(dino, model).fit(data.folder(tree, "test"))
    assert detector.n_images == 12
    assert model.history[-1][3] < 0.7 * model.history[0][3]
    found = list(detector.predict([weave(40), spoiled(41, (96, 120))]))
    assert [tuple(p.map.shape) for p in found] == [(96, 96), (96, 120)]
    assert found[1].map[70:, 90:].mean() > 3 * found[1].map[:48, :60].mean()
    threshold = detector.calibrate([weave(i) for i in range(50, 54)], fpr=0.05)
    detector.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector", device="cpu")
    assert loaded.thresholds["pixel"] == threshold
    assert torch.equal(next(loaded.predict(weave(40))).map, found[0].map)
    with pytest.raises(InputError, match="zero_shot learns from abnormal ones too; calibrate on other"):
        detector.calibrate(data.folder(tree, "test"), cross_fit=2)


def test_masks_reach_the_model_at_the_size_of_the_pixels(
    dino: Backbone, model: ZeroShot, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Features] = []
    monkeypatch.setattr(model, "fit", lambda stream, **_: seen.extend(stream))
    listed = [
        *data.folder(tree, "test"),
        Sample("wide", lambda: weave(3, (96, 150)), lambda: np.tile(MASK, 2)[:, :150]),
    ]
    Detector(dino, model).fit(listed, validation=data.folder(tree, "test")[:2], batch_size=5)
    assert [tuple(f.masks.shape) for f in seen if f.masks is not None] == [
        (5, 70, 70),
        (5, 70, 70),
        (2, 70, 70),
        (1, 70, 98),
    ]
    masks = torch.cat([f.masks for f in seen[:3] if f.masks is not None])
    assert masks.flatten(1).any(1).tolist() == [False] * 6 + [True] * 6
    expected = torch.zeros(70, 70, dtype=torch.bool)
    expected[47:, 47:] = True  # 64 of 96 is 46.7 of 70
    assert torch.equal(masks[6], expected)


def test_adapters_that_came_trained_need_no_images(dino: Backbone, model: ZeroShot, tmp_path: Path) -> None:
    state = Detector(dino, model).fit([sample(i, i % 2 == 0) for i in range(4)]).model.state()
    fresh = ZeroShot(**model.params())
    fresh.load_state(state)
    detector = Detector(dino, fresh)
    (found,) = detector.predict(weave(9))
    detector.save(tmp_path / "detector")
    (again,) = Detector.load(tmp_path / "detector", device="cpu").predict(weave(9))
    assert torch.equal(found.map, again.map)
    assert found.score == again.score


def sample(seed: int, bad: bool = False, mask: np.ndarray | None = None) -> Sample:
    truth = mask if mask is not None else MASK if bad else MASK & False
    return Sample(f"{seed}", lambda: spoiled(seed, box=BOX) if bad else weave(seed), lambda: truth)


def test_images_without_usable_masks_are_named(dino: Backbone, lite0: Backbone, model: ZeroShot) -> None:
    with pytest.raises(InputError, match=r"array\[1\]: has no mask, .*one, all False for normal images"):
        Detector(dino, model).fit([sample(1), weave(2)])
    with pytest.raises(
        InputError, match=r"7: its mask has the size \(H, W\) = \(50, 60\), the image \(96, 96\)"
    ):
        Detector(dino, model).fit([sample(1), sample(7, mask=np.ones((50, 60), np.bool_))])
    with pytest.raises(InputError, match="rotate turns images without their masks"):
        Detector(dino, model).fit([sample(1)], rotate=True)
    with pytest.raises(InputError, match="these features have none"):
        Detector(lite0, ZeroShot("cloth", model.text, n_taps=1)).fit([sample(1)])

    def broken() -> np.ndarray:
        raise InputError("3: its mask is torn")

    with pytest.raises(BadFilesError, match="3: its mask is torn"):
        Detector(dino, model).fit([sample(1), Sample("3", lambda: weave(3), broken)])
    assert not model.is_fitted


@pytest.mark.parametrize(
    ("size", "resize"), [(28, "edge"), (28, "squash"), ((42, 28), "squash"), (33, "edge")]
)
def test_a_mask_is_resized_as_its_image(size, resize) -> None:
    preprocess = Preprocess(size, 14, resize)
    mask = np.zeros((60, 90), np.bool_)
    mask[20:40, 45:] = True
    found = preprocess.mask(mask)
    pixels = preprocess.resized(np.repeat(mask[..., None] * np.uint8(255), 3, 2))[..., 0]
    assert found.shape == pixels.shape
    assert found.dtype == np.bool_
    sure = (pixels < 30) | (pixels > 225)
    assert np.array_equal(found[sure], pixels[sure] > 127)
    assert sure.mean() > 0.8


def test_a_small_defect_stays() -> None:
    mask = np.zeros((280, 280), np.bool_)
    assert not Preprocess(28, 14).mask(mask).any()
    mask[101, 55] = True
    found = Preprocess(28, 14).mask(mask)
    assert found[10, 5]
    assert found.sum() <= 4
    same = Preprocess(280, 14).mask(mask)
    assert np.array_equal(same, mask)
