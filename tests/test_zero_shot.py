"""AD-DINOv3 against a second derivation in float64 NumPy, its published files, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dinofast import artifact, models
from dinofast.errors import ArtifactError, InputError
from dinofast.models import zero_shot, zero_shot_maps, zero_shot_training
from dinofast.models.zero_shot import ZeroShot
from dinofast.text_vectors import TextVectors
from dinofast.types import Features

KEYS = json.loads((Path(__file__).parent / "keys" / "ad_dinov3_adapters.json").read_text())["tensors"]
TAPS, WIDTH, CHANNELS, SIZE = 2, 4, 3, (7, 9)
ADAPTERS = {"patch_token_adapter": "patch_adapter", "cls_token_adapter": "cls_adapter"}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(width: int = WIDTH, names: tuple[str, ...] = ("lung", "object"), tower: str = "0") -> TextVectors:
    pairs = {name: F.normalize(random(2, width, seed=i + 40), dim=1) for i, name in enumerate(names)}
    return TextVectors(pairs, tower * 64, "a toy")


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    text().save(tmp_path / "text")
    return str(tmp_path / "text")


def images(
    b: int = 3, seed: int = 0, grid: tuple[int, int] = (3, 4), size: tuple[int, int] = SIZE, **changes: Any
) -> Features:
    """Images with a rectangle of truth in all but the last."""
    masks = torch.zeros(b, *size, dtype=torch.bool)
    for i in range(b - 1):
        masks[i, i : i + 3, 2 : 4 + i] = True
    tensor = random(b, *grid, TAPS * CHANNELS, seed=seed) * 2 + 1
    found = {"tensor": tensor, "cls": random(b, TAPS * CHANNELS, seed=seed + 1), "image_size": size}
    return Features(**found | {"masks": masks} | changes)


def fitted(text_file: str, **params: Any) -> ZeroShot:
    few = {"n_taps": TAPS, "n_epochs": 2, "learning_rate": 0.01}
    return ZeroShot(**{"text": text_file} | few | params).fit([images()])


# A second derivation


def leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.01 * x)


def enlarged(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear with aligned corners, by one-dimensional interpolation of rows, then of columns."""
    h, w = grid.shape
    tall = np.stack([np.interp(np.linspace(0, h - 1, size[0]), np.arange(h), c) for c in grid.T], 1)
    return np.stack([np.interp(np.linspace(0, w - 1, size[1]), np.arange(w), r) for r in tall])


class Truth:
    """One image: maps and logits, tap by tap, with both channels of every softmax."""

    def __init__(self, weights, tokens, cls, pair, size, interleaved=False):
        h, w, _ = tokens.shape
        taps, _, d = weights["patch_adapter"].shape
        rows = tokens.reshape(h * w, -1)
        rows = (rows - rows.mean(0)) / (rows.std(0, ddof=1) + 1e-6)
        normal, abnormal = (leaky(weights["text_adapter"][i] @ pair[i]) for i in range(2))
        columns = (normal, abnormal)
        if interleaved:  # even positions of both, then odd positions of both
            columns = tuple(np.concatenate([normal[i::2], abnormal[i::2]]) for i in range(2))
        self.normal, self.map, self.aware, self.logits = 0, 0, 0, 0
        self.patches = 0
        for tap in range(taps):
            part = slice(tap * d, (tap + 1) * d)
            p = leaky(rows[:, part] @ weights["patch_adapter"][tap].T)
            p /= np.linalg.norm(p, axis=1, keepdims=True)
            q = leaky(weights["cls_adapter"][tap] @ cls[part])
            q /= np.linalg.norm(q)
            coarse = [(100 * p @ column).reshape(h, w) for column in columns]
            fine = np.exp([enlarged(channel, size) for channel in coarse])
            self.normal, self.map = (
                total + channel / taps
                for total, channel in zip((self.normal, self.map), fine / fine.sum(0), strict=True)
            )
            self.patches += np.exp(coarse[1]) / np.exp(coarse).sum(0) / taps
            self.aware += 1 / (1 + np.exp(-enlarged((10 * p @ q).reshape(h, w), size))) / taps
            self.logits += np.array([100 * q @ column for column in columns]) / taps

    def losses(self, mask):
        hot = np.clip(np.stack([~mask, mask]).astype(float), 1e-5, 1 - 1e-5)

        def both(normal, abnormal):
            pt = hot[0] * normal + hot[1] * abnormal + 1e-5
            overlap = (2 * abnormal[mask].sum() + 1) / (abnormal.sum() + mask.sum() + 1)
            return np.mean(-((1 - pt) ** 2) * np.log(pt)) + 1 - overlap

        entropy = np.log(np.exp(self.logits).sum()) - self.logits[int(mask.any())]
        return np.array([both(1 - self.aware, self.aware), both(self.normal, self.map), entropy])


def doubles(tensors):
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def truths(weights, features, pairs, interleaved=False):
    return [
        Truth(weights, tokens, cls, pair, features.image_size, interleaved)
        for tokens, cls, pair in zip(
            features.tensor.double().numpy(), features.cls.double().numpy(), pairs, strict=True
        )
    ]


@pytest.mark.parametrize("compat", [None, "ad-dinov3"])
@pytest.mark.parametrize("size", [SIZE, (24, 32), (3, 4), (1, 1), (2, 5)])
def test_maps_and_logits_are_those_of_the_equations(compat, size, text_file) -> None:
    model = fitted(text_file, compat=compat, n_epochs=3)
    features = images(4, seed=9, size=size, masks=None)
    pairs = [doubles(text().vectors)["object"]] * 4
    expected = truths(doubles(model.state()), features, pairs, compat is not None)
    scores = model.score(features)
    for found, wanted in (
        (scores.map, [t.map for t in expected]),
        (model.awareness_map(features), [t.aware for t in expected]),
        (model.patch_scores(features), [t.patches for t in expected]),
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(
        model.global_logits(features), [t.logits for t in expected], rtol=1e-4, atol=1e-4
    )
    chance = np.exp([t.logits for t in expected])
    chance = chance[:, 1] / chance.sum(1)
    highest = np.array([t.map.max() for t in expected])
    for rule, wanted in (("global", chance), ("max", highest), ("mean", (chance + highest) / 2)):
        other = ZeroShot(**model.params() | {"image_score": rule})
        other.load_state(model.state())
        np.testing.assert_allclose(other.score(features).score, wanted, atol=1e-5)


def test_the_two_text_matrices_differ(text_file) -> None:
    stacked = fitted(text_file)
    woven = ZeroShot(**stacked.params() | {"compat": "ad-dinov3"})
    woven.load_state(stacked.state())
    assert not torch.allclose(stacked.score(images()).map, woven.score(images()).map, atol=1e-2)


def total_loss(weights, batches, pairs, interleaved):
    terms = [
        truth.losses(mask)
        for batch in batches
        for truth, mask in zip(
            truths(weights, batch, [pairs[batch.class_name or "object"]] * len(batch), interleaved),
            batch.masks.numpy(),
            strict=True,
        )
    ]
    return np.mean(terms, axis=0)


def slopes(weights, loss):
    """Differentiate by central differences; `weights` are changed in place and put back."""
    found = {name: np.zeros_like(w) for name, w in weights.items()}
    for name, w in weights.items():
        for at in np.ndindex(w.shape):
            kept, sides = w[at], []
            for shift in (1e-6, -1e-6):
                w[at] = kept + shift
                sides.append(loss())
            w[at] = kept
            found[name][at] = (sides[0] - sides[1]) / 2e-6
    return found


@pytest.mark.parametrize(("compat", "dealt"), [(None, [[0, 1, 2, 3]]), ("ad-dinov3", [[0, 3, 1], [2]])])
def test_training_follows_the_equations(compat, dealt, text_file, monkeypatch) -> None:
    """Losses and AdamW in NumPy, gradients by central differences; two classes, two sizes, uneven batches."""
    monkeypatch.setattr(zero_shot_training.TruthStore, "batches", lambda *_: iter(dealt))
    batches = [images(2), images(2, seed=5, grid=(2, 3), size=(5, 4), class_name="lung")]
    single = [
        replace(batch, tensor=batch.tensor[i : i + 1], cls=batch.cls[i : i + 1], masks=batch.masks[i : i + 1])
        for batch in batches
        for i in range(2)
    ]
    rate, decay, epochs = 1e-3, 0.1, 3
    params = {"n_epochs": epochs, "batch_size": len(dealt[0]), "learning_rate": rate, "weight_decay": decay}
    model = ZeroShot("object", text_file, TAPS, seed=3, compat=compat, **params).fit(batches)
    pairs, share = doubles(text().vectors), np.array([0.25, 0.5, 0.25])
    weights = doubles(zero_shot_training.initial(TAPS, WIDTH, CHANNELS, 3))
    first, second = ({name: np.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    step = 0
    for epoch in range(epochs):
        sums = np.zeros(3)
        for numbers in dealt:
            step += 1
            taken = [single[i] for i in numbers]
            sums += total_loss(weights, taken, pairs, compat is not None) * len(taken)
            gradients = slopes(
                weights, lambda taken=taken: share @ total_loss(weights, taken, pairs, compat is not None)
            )
            for name, g in gradients.items():
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g**2
                mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
                weights[name] = weights[name] * (1 - rate * decay) - rate * mean / (np.sqrt(square) + 1e-8)
        np.testing.assert_allclose(model.history[epoch], [*sums / 4, share @ sums / 4], rtol=1e-5)
    for name, w in weights.items():
        np.testing.assert_allclose(model.state()[name], w, atol=1e-5)


def test_every_epoch_of_every_seed_is_shuffled_anew(text_file, monkeypatch) -> None:
    seen = []
    deal = zero_shot_training.TruthStore.batches
    monkeypatch.setattr(
        zero_shot_training.TruthStore,
        "batches",
        lambda store, size, seed: seen.append(list(deal(store, size, seed))) or iter(seen[-1]),
    )
    for seed in (0, 1):
        ZeroShot("object", text_file, TAPS, n_epochs=3, batch_size=4, seed=seed).fit([images(9)])
    assert all(sorted(i for images in batches for i in images) == list(range(9)) for batches in seen)
    assert len({str(batches) for batches in seen}) == 6


def test_patches_are_standardized_without_bias() -> None:
    tensor = random(2, 3, 4, 5)
    rows = tensor.double().numpy().reshape(2, 12, 5)
    expected = (rows - rows.mean(1, keepdims=True)) / (rows.std(1, ddof=1, keepdims=True) + 1e-6)
    found = zero_shot_maps.standardized(tensor)
    np.testing.assert_allclose(found.numpy().reshape(2, 12, 5), expected, atol=1e-6)
    assert torch.equal(tensor, random(2, 3, 4, 5))


def test_gradients_reach_every_adapter() -> None:
    drawn = zero_shot_training.initial(TAPS, WIDTH, CHANNELS, 0)
    weights = {name: w.double().requires_grad_() for name, w in drawn.items()}
    features, pairs = images(2), torch.stack(list(text().vectors.values())).double()

    def loss(patch, cls, texts):
        matrix = zero_shot_maps.text_matrix(pairs, texts, True)
        adapters = {"patch_adapter": patch, "cls_adapter": cls}
        return zero_shot_training.losses(
            adapters, features.tensor.double(), features.cls.double(), matrix, features.masks
        )

    assert torch.autograd.gradcheck(loss, tuple(weights.values()))


def test_no_image_weighs_more_for_the_way_a_batch_is_cut(text_file, monkeypatch) -> None:
    expected = fitted(text_file)
    monkeypatch.setattr(zero_shot_training, "_AT_ONCE", 1)
    found = fitted(text_file)
    for name, tensor in expected.state().items():
        torch.testing.assert_close(found.state()[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_first_steps_warm_up_from_zero(text_file) -> None:
    model = fitted(text_file, n_epochs=70, weight_decay=1.0)  # 3 % of 70 steps: 2, at rates 0 and 1/2
    loss = [row[3] for row in model.history]
    assert loss[1] == pytest.approx(loss[0], rel=1e-6)
    assert loss[2] != pytest.approx(loss[1], rel=1e-4)
    half = fitted(text_file, n_epochs=1, weight_decay=1.0, learning_rate=0.005)
    short = fitted(text_file, n_epochs=2, weight_decay=1.0, learning_rate=0.005)
    assert short.history[1][3] == pytest.approx(loss[2], rel=1e-4)
    assert half.history[0][3] == pytest.approx(loss[0], rel=1e-6)


def test_it_learns_to_find_what_it_was_shown(text_file) -> None:
    kinds = random(2, TAPS * CHANNELS, seed=1)

    def scenes(b, seed):
        tensor = kinds[0] + 0.5 * random(b, 8, 8, TAPS * CHANNELS, seed=seed)
        masks = torch.zeros(b, 16, 16, dtype=torch.bool)
        for i in range(0, b, 2):
            y, x = (seed + i) % 5, (seed + 2 * i) % 5
            tensor[i, y : y + 3, x : x + 3] += kinds[1] * 4
            masks[i, 2 * y : 2 * y + 6, 2 * x : 2 * x + 6] = True
        return Features(tensor, tensor.mean(dim=(1, 2)), (16, 16), masks=masks)

    model = ZeroShot("object", text_file, TAPS, "mean", 30, 4, 3e-3).fit([scenes(12, 1)])
    assert model.history[-1][3] < 0.6 * model.history[0][3]
    unseen = scenes(6, 90)
    found = model.score(unseen)
    assert found.map[unseen.masks].mean() > 3 * found.map[~unseen.masks].mean()
    assert found.score[::2].min() > found.score[1::2].max()
    elsewhere = model.for_class("lung").score(unseen)
    assert not torch.allclose(elsewhere.map, found.map, atol=1e-3)


# Runs that go on, and validation


class Stopped(Exception):
    pass


def test_a_stopped_run_goes_on_to_the_same_numbers(text_file, tmp_path) -> None:
    def stop(stage, done, total):
        assert (stage, total) == ("train", 7)
        if done == 3:
            raise Stopped

    made = lambda: ZeroShot("object", text_file, TAPS, n_epochs=7, batch_size=2, learning_rate=0.01)  # noqa: E731
    held_back = [images(2, seed=70)]
    whole = made().fit([images(5)], validation=held_back)
    with pytest.raises(Stopped):
        made().fit([images(5)], validation=held_back, checkpoint=tmp_path / "run", progress=stop)
    told = []
    model = made().fit(
        [images(5)], validation=held_back, checkpoint=tmp_path / "run", progress=lambda *a: told.append(a[1])
    )
    assert told == [3, 4, 5, 6, 7]
    assert model.history == whole.history
    for name, tensor in whole.state().items():
        assert torch.equal(model.state()[name], tensor)
    with pytest.raises(ArtifactError, match=r"another run .features differ.*delete it"):
        made().fit([images(5, seed=1)], validation=held_back, checkpoint=tmp_path / "run")
    changed = images(5)
    changed.masks[4, 0, 0] = True
    with pytest.raises(ArtifactError, match=r"another run .features differ"):
        made().fit([changed], validation=held_back, checkpoint=tmp_path / "run")
    text(names=("object", "lung")).save(text_file)
    with pytest.raises(ArtifactError, match="other text vectors; delete it"):
        made().fit([images(5)], validation=held_back, checkpoint=tmp_path / "run")


def test_validation_keeps_the_best_epoch(text_file) -> None:
    held_back = images(3, seed=70)
    losses, states = [], []
    for n in range(1, 6):
        model = ZeroShot("object", text_file, TAPS, n_epochs=n, learning_rate=0.05).fit([images()])
        terms = total_loss(doubles(model.state()), [held_back], doubles(text().vectors), False)
        losses.append(terms @ [0.25, 0.5, 0.25])
        states.append(model.state())
    best = int(np.argmin(losses))
    assert best < 4, "the last epoch is the best: this shows nothing"
    model = ZeroShot("object", text_file, TAPS, n_epochs=5, learning_rate=0.05)
    model.fit([images()], validation=[held_back])
    np.testing.assert_allclose([row[4] for row in model.history], losses, rtol=1e-4)
    for name, tensor in states[best].items():
        torch.testing.assert_close(model.state()[name], tensor)


def test_seeds_tell_runs_apart(text_file) -> None:
    first, again, other = (fitted(text_file, seed=seed).score(images()).map for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def test_initial_adapters_are_uniform_within_their_bounds() -> None:
    drawn = zero_shot_training.initial(2, 40, 50, 0)
    assert [tuple(w.shape) for w in drawn.values()] == [(2, 40, 50), (2, 40, 50), (2, 40, 40)]
    for name, w in drawn.items():
        limit = 1 / math.sqrt(w.shape[2])
        assert 0.98 * limit < w.abs().max() <= limit, name
        assert w.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)


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


# What is refused


BAD_PARAMS = [
    ({"class_name": ""}, "class name '': give a noun"),
    ({"class_name": " "}, "give a noun"),
    ({"n_taps": 0}, "n_taps must be a whole number, at least 1, got 0"),
    ({"n_epochs": 1.5}, "n_epochs must be"),
    ({"batch_size": -1}, "batch_size must be"),
    ({"learning_rate": 0.0}, "learning_rate must be a finite number, above 0"),
    ({"learning_rate": "x"}, "learning_rate must be a finite number, above 0, got 'x'"),
    ({"seed": -1}, "seed must be a whole number"),
    ({"weight_decay": math.inf}, "weight_decay must be a finite number, at least 0, got inf"),
    ({"image_score": "sum"}, "unknown image_score 'sum'; one of global, max, mean"),
    ({"compat": "paper"}, "unknown compat 'paper'; None or one of ad-dinov3"),
    ({"text": Path("text")}, "text must be the path"),
]


@pytest.mark.parametrize(("params", "message"), BAD_PARAMS)
def test_parameters_that_cannot_be_used(params, message) -> None:
    with pytest.raises(InputError, match=message):
        ZeroShot(**params)


def nan_cls() -> torch.Tensor:
    cls = random(3, TAPS * CHANNELS)
    cls[1, 2] = torch.nan
    return cls


BAD_BATCHES = {
    "no masks": ({"masks": None}, "a batch came without; set Features.masks, or .*from_published"),
    "masks of another size": (
        {"masks": torch.zeros(3, 9, 7, dtype=torch.bool)},
        r"masks must be bool \(B, H, W\) = \(3, 7, 9\), the images' size, got torch.bool \(3, 9, 7\)",
    ),
    "too few masks": ({"masks": torch.zeros(2, *SIZE, dtype=torch.bool)}, r"got torch.bool \(2, 7, 9\)"),
    "masks of numbers": ({"masks": torch.zeros(3, *SIZE)}, "got torch.float32"),
    "a class without prompts": ({"class_name": "heart"}, "no text vectors of class 'heart'"),
    "a class without a name": ({"class_name": "?"}, "give a noun"),
}
BAD_CLS = {
    "no class tokens": ({"cls": None}, "these features have none .cls=None.; use a DINOv3"),
    "class tokens of another width": (
        {"cls": random(3, 5)},
        r"= \(3, 6\) on cpu, got torch.float32 \(3, 5\)",
    ),
    "class tokens of whole numbers": ({"cls": torch.zeros(3, 6).long()}, "got torch.int64"),
    "NaN in a class token": ({"cls": nan_cls()}, "class tokens hold NaN"),
    "one patch": ({"tensor": random(3, 1, 1, TAPS * CHANNELS)}, "needs 2 of them, got 1"),
}


@pytest.mark.parametrize("case", BAD_BATCHES | BAD_CLS)
def test_batches_that_cannot_be_learned(case, text_file, tmp_path) -> None:
    changes, message = (BAD_BATCHES | BAD_CLS)[case]
    model = fitted(text_file)
    before = model.score(images())
    with pytest.raises(InputError, match=message):
        model.fit([images(), images(**changes)])
    with pytest.raises(InputError, match=message):
        model.fit([images()], validation=[images(**changes)])
    assert torch.equal(model.score(images()).map, before.map)


@pytest.mark.parametrize("case", BAD_CLS)
def test_images_that_cannot_be_scored(case, text_file) -> None:
    changes, message = BAD_CLS[case]
    model = fitted(text_file)
    for use in (model.score, model.global_logits, model.awareness_map):
        with pytest.raises(InputError, match=message):
            use(images(**changes))


def test_the_largest_value_needs_no_class_token(text_file) -> None:
    model = fitted(text_file, image_score="max")
    assert torch.equal(model.score(images(cls=None)).score, model.score(images()).score)


def test_what_is_missing_for_a_fit_is_said_before_the_work(text_file, tmp_path) -> None:
    def untouched():
        pytest.fail("the features were read")
        yield

    with pytest.raises(InputError, match=r"needs text vectors to fit: .*vectors\(\['object'\]\).*text=FILE"):
        ZeroShot().fit(untouched())
    with pytest.raises(InputError, match="no text vectors of class 'heart', only of lung, object"):
        ZeroShot("heart", text_file).fit(untouched())
    with pytest.raises(InputError, match="no such file"):
        ZeroShot(text=str(tmp_path / "absent")).fit(untouched())
    with pytest.raises(InputError, match="D = 6 is no multiple of n_taps = 4; load the backbone"):
        ZeroShot(text=text_file).fit([images()])


def test_a_training_that_diverges_says_so(text_file) -> None:
    with pytest.raises(
        InputError, match=r"training diverged: the loss is nan in epoch \d+; lower learning_rate"
    ):
        fitted(text_file, learning_rate=1e30, n_epochs=5)


def test_a_constant_image_is_undecided_and_finite(text_file) -> None:
    model = fitted(text_file)
    found = model.score(images(tensor=torch.ones(3, 3, 4, TAPS * CHANNELS)))
    assert torch.allclose(found.map, torch.tensor(0.5))
    flat = model.score(images(tensor=torch.full((3, 3, 4, TAPS * CHANNELS), 0.1)))
    assert flat.map.isfinite().all()


def test_other_states_are_refused(text_file) -> None:
    model = fitted(text_file)
    state = model.state()
    spoiled = [
        {n: t for n, t in state.items() if n != "class/object"},
        state | {"tower": state["tower"][:5]},
        state | {"class/lung": state["class/lung"].double()},
        state | {"patch_adapter": state["patch_adapter"][:1], "cls_adapter": state["cls_adapter"][:1]},
        state | {"more": torch.zeros(2)},
    ]
    for other in spoiled:
        with pytest.raises(
            ArtifactError, match=r"zero_shot of n_taps=2 for class 'object' holds .*this holds"
        ):
            model.load_state(other)


def test_a_file_of_another_class_name_is_refused(text_file, tmp_path) -> None:
    model = fitted(text_file)
    config = {"model": "zero_shot", "params": model.params() | {"class_name": "heart"}}
    artifact.write(tmp_path / "odd", "model", model.state(), config)
    with pytest.raises(ArtifactError, match=r"odd: a zero_shot .*for class 'heart'"):
        models.load(tmp_path / "odd")


def test_fit_works_under_inference_mode(text_file: str) -> None:
    expected = fitted(text_file).state()
    with torch.inference_mode():
        found = fitted(text_file).state()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_classes_share_what_was_computed(text_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = fitted(text_file), []
    plain = zero_shot_maps.text_matrix
    monkeypatch.setattr(zero_shot_maps, "text_matrix", lambda *args: calls.append(1) or plain(*args))
    other = next(name for name in model.classes if name != model.class_name)
    for seed in range(3):
        model.patch_scores(images(seed=seed, class_name=other))
    assert len(calls) == 1
