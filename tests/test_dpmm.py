"""DPMM: held to a second derivation in NumPy."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from dpmm_truth import COMPATS, EPS, KINDS, Derived, images, near, rows, same_parameters, started

from dinofast.errors import InputError
from dinofast.models import mixture, mixture_start
from dinofast.models.dpmm import DPMM
from dinofast.models.feature_store import FeatureStore
from dinofast.models.mixture_scores import DISTANCES, SCORINGS, active, score_rows
from dinofast.types import Features

SCHEDULES = (("ema", 0.2), ("exp", 0.6), (None, 0.2))


@pytest.mark.parametrize("compat", COMPATS)
@pytest.mark.parametrize("learn", [True, False], ids=["learned", "fixed"])
@pytest.mark.parametrize(("schedule", "rate"), SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_scores_follow_the_derivation(kind, schedule, rate, learn, compat):
    start = started(kind, "first-rows" if learn else "k-means++", k=4)
    derived = Derived(start, kind, schedule, rate, learn, compat)
    params = {
        "n_components": 4, "covariance_type": kind, "schedule": schedule, "update_rate": rate,
        "learn_concentration": learn, "compat": compat, "normalize": False, "eps": EPS,
    }  # fmt: skip
    model = DPMM(**params)
    wide = ("first", "second", "means", "covariances")
    state, exact = start, replace(start, **{name: getattr(start, name).double() for name in wide})
    for t in range(4):
        batch = rows(300 - 40 * t, seed=t)
        state, total = mixture.step(state, batch, model._rule)
        exact, _ = mixture.step(exact, batch.double(), model._rule)
        np.testing.assert_allclose(total, derived.step(batch), rtol=1e-4, atol=2**-11)
        same_parameters(state, derived)
        same_parameters(exact, derived, within=1e-10)
    assert state.iteration == 4
    query = rows(60, seed=99) * 1.2
    features = Features(query.view(1, 6, 10, -1), None, (6, 10))
    for scoring in SCORINGS:
        scorer = DPMM(**params, scoring=scoring)
        scorer.load_state(state.tensors() | {"lower_bound": torch.zeros((), dtype=torch.float64)})
        expected = derived.score(query, scoring)
        near(scorer.patch_scores(features).flatten(), expected, 1e-5 * max(1, np.abs(expected).max()))
        parts = active(exact, model._rule, 1e-6, rescaled=compat != "paper" and scoring in DISTANCES)
        near(score_rows(query.double(), parts, scoring), expected, 1e-6)
    assert torch.equal(scorer.score_samples(features), -scorer.patch_scores(features))
    near(scorer.weights_, np.exp(derived.log_pi()))
    joint = (derived.log_pi() + derived.log_density(query.double().numpy()))[:, derived.kept(False)]
    owner = np.flatnonzero(derived.kept(False))[joint.argmax(1)]
    assert scorer.assign(features).flatten().tolist() == owner.tolist()


@pytest.mark.parametrize("init", mixture_start.INITS)
def test_fit_makes_the_steps_of_all_epochs_and_keeps_the_best_by_validation(init):
    train, held_back = images(5), images(3, seed=50)
    model = DPMM(
        n_components=15, n_epochs=5, batch_size=2, init=init, update_rate=0.9, seed=3, normalize=False
    )
    model.fit([train], validation=[held_back])
    with FeatureStore.of([train]) as store:
        first = store.rows(next(store.batches(2, model._shuffle(0))))
        start = started(
            init=init, k=15, x=first if init == "first-rows" else train.tensor.flatten(0, 2), seed=3
        )
        derived = Derived(start, "diag", "ema", 0.9, True, "paper")
        bounds, states = [], []
        for epoch in range(5):
            for batch in store.batches(2, model._shuffle(epoch)):
                derived.step(store.rows(batch))
            y = held_back.tensor.flatten(0, 2).numpy()
            bounds.append(-np.mean([derived.score(part, "mixture").mean() for part in np.split(y, 3)]))
            states.append((derived.mu.copy(), derived.alpha))
    best = int(np.argmax(bounds))
    near(model.lower_bound_, bounds[best], 1e-3)
    near(model.means_, states[best][0], 1e-3)
    near(model.weight_concentration_, states[best][1], 1e-3)
    assert model.n_iter_ == 3 * (best + 1)
    assert best < 4, "the last epoch would be kept without validation too"


def test_without_validation_the_last_epoch_is_kept():
    model = DPMM(n_components=5, n_epochs=3, batch_size=2).fit([images()])
    assert model.n_iter_ == 9
    assert math.isfinite(model.lower_bound_)
    once = DPMM(n_components=5, n_epochs=1, batch_size=5).fit([images()])
    again = DPMM(n_components=5, n_epochs=1, batch_size=5).fit([images()], validation=[images(2, seed=9)])
    assert torch.equal(once.means_, again.means_)
    assert once.lower_bound_ != again.lower_bound_


def test_patience_stops_and_needs_validation():
    told = []
    params = {"n_components": 6, "n_epochs": 30, "batch_size": 2, "update_rate": 0.9, "seed": 3}
    model = DPMM(**params, patience=2)
    model.fit([images()], validation=[images(3, seed=50)], progress=lambda *a: told.append(a))
    assert told[-1][1] == model.n_iter_ + 2 * 3 < 90
    with pytest.raises(InputError, match="patience needs validation"):
        model.fit([images()])


def test_validation_weighs_the_mean_of_a_batch_by_its_images():
    small, large = images(2, 2, 2, seed=1), images(1, 9, 9, seed=2)
    model = DPMM(n_components=4, n_epochs=1, batch_size=2, normalize=False)
    model.fit([images()], validation=[small, large])
    near(model.lower_bound_, (2 * model.score_samples(small).mean() + model.score_samples(large).mean()) / 3)


def test_first_rows_are_the_first_patches_of_one_image_in_random_order():
    x = rows(50)
    start = started(init="first-rows", k=20, x=x)
    assert {tuple(r) for r in start.means.tolist()} == {tuple(r) for r in x[:20].tolist()}
    assert not torch.equal(start.means, x[:20])
    assert not torch.equal(start.means, started(init="first-rows", k=20, x=x, seed=1).means)
    assert start.sticks[-1] == 1
    near(start.covariances, np.tile(x.double().numpy().var(0, ddof=1) + 1e-6, (20, 1)))
    many = started(init="first-rows", k=4000, x=x)
    assert many.means[50:].std().item() == pytest.approx(1, abs=0.05)
    assert many.sticks[:-1].mean().item() == pytest.approx(1 / 3, abs=0.02), "Beta(1, 2)"


def test_default_start_draws_from_all_images_and_gives_shares_as_weights():
    x = torch.cat([rows(300) + 20 * i for i in range(4)])
    start = started(k=8, x=x)
    assert len({int(m.mean() / 20 + 0.5) for m in start.means}) == 4
    assert {tuple(r) for r in start.means.tolist()} <= {tuple(r) for r in x.tolist()}
    owner = torch.cdist(x.double(), start.means.double()).argmin(1)
    shares = torch.bincount(owner, minlength=8) / len(x)
    near(mixture.Rule().log_weights(start.sticks).exp(), shares)
    assert shares.tolist() == sorted(shares.tolist(), reverse=True)
    assert torch.equal(start.means, started(k=8, x=x).means)
    assert not torch.equal(start.means, started(k=8, x=x, seed=1).means)


def test_sticks_that_float32_loses_stay_in_the_log_domain():
    start = started(init="first-rows", k=500, x=rows(600))
    logs = mixture.Rule().log_weights(start.sticks)
    assert bool(logs.isfinite().all())
    assert logs.min() < -150
    published = DPMM(compat="anomalydino-dpmm")._rule.log_weights(start.sticks)
    assert torch.equal(
        published == -torch.inf, torch.from_numpy(np.exp(logs.numpy()).astype(np.float32) == 0)
    )
    assert 150 < int(published.isfinite().sum()) < 270


def test_concentration_never_falls_below_one():
    model = DPMM(n_components=30, init="first-rows", normalize=False)
    for _ in range(5):
        model.partial_fit(Features(torch.ones(1, 20, 20, 3), None, (20, 20)))
        assert 1 <= model.weight_concentration_ < math.inf
    lone = mixture.begin(torch.zeros(2, 6), torch.ones(6), torch.tensor([0.5, 1.0]).double(), 1.0, full=False)
    counts = torch.tensor([399.0, 1.0])
    after = mixture.update(lone, counts, torch.zeros(2, 6), torch.ones(2, 6), 400, mixture.Rule())
    assert after.concentration == 1
    assert bool((after.sticks <= 1).all())


def test_active_sets_differ_as_published():
    """Weights that sum to 0.5: one component passes the threshold only when they are scaled to 1."""
    base = images(1)
    for scoring, expected in (("euclidean", 2), ("likelihood", 1), ("mixture", 1)):
        model = DPMM(
            n_components=3, compat="anomalydino-dpmm", scoring=scoring, weight_threshold=0.3, normalize=False
        ).partial_fit(base)
        state = model.state()
        sticks = torch.tensor([0.35, 0.25 / 0.65, 0.0], dtype=torch.float64)
        model.load_state(state | {"sticks": sticks})
        parts = model._parts(scoring == "euclidean")
        assert parts.index.tolist() == list(range(expected))
        assert model._parts(scoring == "euclidean") is parts
        found = model.patch_scores(base).flatten()
        near(found, score_rows(base.tensor.flatten(0, 2), parts, scoring))
        if scoring == "euclidean":
            near(found, torch.cdist(base.tensor.flatten(0, 2), state["means"][:2]).amin(1))
    model.weight_threshold = 0.9
    model.load_state(model.state())
    with pytest.raises(InputError, match=r"no component has a weight above weight_threshold = 0.9, .* 0.35"):
        model.score(base)


def test_empty_last_component_of_a_closed_stick_takes_no_part():
    far = Features(torch.zeros(1, 4, 4, 6), None, (4, 4))
    model = DPMM(n_components=150, n_epochs=3, scoring="euclidean", init="first-rows", normalize=False)
    model.fit([images()])
    assert model.weights_.sum().item() == pytest.approx(1)
    assert model.state()["mass"][-1] < EPS
    assert model.weights_[-1] > 1e-6
    assert model.means_[-1].abs().max() < 1e-3
    assert 149 not in model.assign(far)
    assert model.patch_scores(far).min() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", mixture_start.INITS)
@pytest.mark.parametrize("compat", COMPATS)
def test_poor_data_stays_finite(kind, init, compat):
    cases = {
        "one row": torch.ones(1, 1, 1, 4),
        "duplicates": torch.ones(3, 4, 4, 4),
        "two kinds": torch.eye(4)[torch.arange(32) % 2].view(2, 4, 4, 4),
        "zero patches": torch.zeros(2, 3, 3, 4),
        "more components than rows": rows(8, 4).view(1, 2, 4, 4),
    }
    for name, tensor in cases.items():
        features = Features(tensor, None, (8, 8))
        model = DPMM(n_components=12, covariance_type=kind, init=init, compat=compat, n_epochs=3)
        model.fit([features])
        for scoring in SCORINGS:
            model.scoring = scoring
            assert bool(model.score(features).map.isfinite().all()), (name, scoring)
        assert bool((model.weights_ >= 0).all()), name
        assert math.isfinite(model.lower_bound_), name
