"""AD-DINOv3 against a second derivation in float64 NumPy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from zero_shot_truth import CHANNELS, SIZE, TAPS, WIDTH, doubles, fitted, images, random, text, truths

from dinofast.errors import ArtifactError
from dinofast.models import zero_shot_maps, zero_shot_training
from dinofast.models.zero_shot import ZeroShot
from dinofast.types import Features


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
