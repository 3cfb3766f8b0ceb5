from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score
from textures import RGB, spoiled, weave

from dinofast import Detector
from dinofast.backbone import Backbone
from dinofast.data import Sample
from dinofast.data.sample import Mask
from dinofast.errors import InputError
from dinofast.evaluate import PixelRanking, evaluate


def labeled(image: RGB, label: int | None, mask: Mask | None = None, name: str = "image") -> Sample:
    return Sample(name, lambda: image, None if mask is None else lambda: mask, label)


@pytest.fixture(scope="module")
def detector(lite0: Backbone) -> Detector:
    return Detector(lite0).fit([weave(i) for i in range(3)])


TRUTH = np.zeros((96, 96), bool)
TRUTH[64:, 64:] = True
NONE = np.zeros((96, 96), bool)


def test_figures_are_those_of_scikit_learn(detector: Detector) -> None:
    images = [labeled(weave(10), 0, NONE), labeled(spoiled(20), 1, TRUTH), labeled(spoiled(21), 1, TRUTH)]
    met = []
    found = evaluate(detector, images, on_prediction=lambda s, p: met.append((s, p)))
    scores = np.concatenate([p.map.numpy().ravel() for _, p in met])
    labels = np.concatenate([NONE.ravel(), TRUTH.ravel(), TRUTH.ravel()])
    assert [s for s, _ in met] == images
    assert (found.n_images, found.labels, found.sources) == (3, [0, 1, 1], ["image"] * 3)
    assert found.scores == [p.score for _, p in met]
    assert found.pixel is not None
    assert found.pixel.auroc == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert found.pixel.average_precision == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    precision, recall, _ = precision_recall_curve(labels, scores)
    assert found.pixel.aupr == pytest.approx(auc(recall, precision), abs=1e-12)
    assert (found.pixel.n_anomalous, found.pixel.n_normal) == (2048, 3 * 96 * 96 - 2048)
    assert found.pixel.error == 0
    assert found.image is not None
    assert (found.image.auroc, found.image.n_normal, found.image.n_anomalous) == (1, 1, 2)
    assert found.to_dict()["pixel"]["auroc"] == found.pixel.auroc
    assert set(found.seconds) == {"read", "preprocess", "backbone", "model"}


def test_only_the_region_counts(detector: Detector) -> None:
    inside = np.zeros((96, 96), bool)
    inside[:, 48:] = True
    image = labeled(spoiled(20), 1, TRUTH)
    found = evaluate(detector, [image], region=lambda _: inside)
    (prediction,) = detector.predict(image)
    assert found.pixel is not None
    assert found.pixel.n_normal + found.pixel.n_anomalous == inside.sum()
    assert found.pixel.auroc == pytest.approx(roc_auc_score(TRUTH[inside], prediction.map[inside]), abs=1e-12)
    assert found.image is None


def test_figures_that_cannot_be_are_none(detector: Detector) -> None:
    only_labels = evaluate(detector, [labeled(weave(10), 0), labeled(spoiled(20), 1)])
    assert only_labels.pixel is None
    assert only_labels.image is not None
    one_mask = evaluate(detector, [labeled(weave(10), 0), labeled(spoiled(20), 1, TRUTH)])
    assert one_mask.pixel is None
    one_kind = evaluate(detector, [labeled(weave(10), 0, NONE)])
    assert (one_kind.image, one_kind.pixel) == (None, None)
    unknown = evaluate(detector, [labeled(weave(10), None, NONE), labeled(spoiled(20), 1, TRUTH)])
    assert unknown.image is None
    assert unknown.pixel is not None


def test_what_cannot_be_evaluated_is_refused(detector: Detector) -> None:
    with pytest.raises(InputError, match="none of these images has a label or a mask"):
        evaluate(detector, [labeled(weave(0), None)])
    with pytest.raises(
        InputError, match=r"a\.png: is \(96, 96\) pixels, its mask \(96, 95\); export it anew"
    ):
        evaluate(detector, [labeled(weave(0), 1, TRUTH[:, 1:], "a.png")])


@pytest.mark.parametrize("gathered", [1, 1500, 2**22])
def test_beyond_the_budget_the_figures_carry_their_error(
    gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinofast.evaluate._GATHERED", gathered)
    rng = np.random.default_rng(0)
    exact, streamed = PixelRanking(), PixelRanking(budget=2500)
    for _ in range(6):
        truth = rng.random((25, 40)) < 0.1
        map = (rng.random((25, 40)) + 0.5 * truth).astype(np.float32)
        exact.update(map, truth)
        streamed.update(map, truth)
    one, other = exact.ranking(), streamed.ranking()
    assert one is not None
    assert other is not None
    assert one.error == 0 < other.error < 1e-2
    for name in ("auroc", "aupr", "average_precision"):
        assert abs(getattr(one, name) - getattr(other, name)) <= other.error
    assert (one.n_normal, one.n_anomalous) == (other.n_normal, other.n_anomalous)
    assert PixelRanking().ranking() is None
