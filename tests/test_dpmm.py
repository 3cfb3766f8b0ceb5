"""DPMM: held to a second derivation in NumPy, to its promises on poor data, to its numbers after SIGKILL."""

import math
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import digamma, logsumexp

from dinofast import models
from dinofast.errors import ArtifactError, InputError
from dinofast.models import mixture, mixture_start
from dinofast.models.dpmm import DPMM
from dinofast.models.feature_store import FeatureStore
from dinofast.models.mixture_scores import DISTANCES, SCORINGS, active, score_rows
from dinofast.types import Features

EPS = float(np.finfo(np.float32).eps)
KINDS = ("diag", "spherical", "full")
SCHEDULES = (("ema", 0.2), ("exp", 0.6), (None, 0.2))
COMPATS = ("paper", "anomalydino-dpmm")


def rows(n=400, d=6, clusters=8, seed=0):
    """Rows around a few centers, each with a spread of its own in every channel."""
    draw = np.random.default_rng(seed)
    centers = np.random.default_rng(5).normal(size=(clusters, d))
    spread = np.random.default_rng(6).uniform(0.1, 0.3, size=(clusters, d))
    owner = draw.integers(clusters, size=n)
    return torch.from_numpy(centers[owner] + spread[owner] * draw.normal(size=(n, d))).float()


def images(b=5, h=4, w=5, d=6, seed=0):
    return Features(rows(b * h * w, d, seed=seed).view(b, h, w, d), None, (24, 30))


class Derived:
    """The published recursion with every pair and every outer product written out, in float64."""

    def __init__(self, start, kind, schedule, rate, learn, compat, reg=1e-6):
        self.kind, self.schedule, self.rate, self.learn, self.reg = kind, schedule, rate, learn, reg
        self.closed = compat == "paper"
        self.mu, self.v, self.alpha = (
            np.asarray(x, np.float64) for x in (start.means, start.sticks, start.concentration)
        )
        k, d = self.mu.shape
        wide = np.asarray(start.covariances, np.float64)
        self.sigma = wide if wide.ndim == 3 else np.einsum("kd,de->kde", wide, np.eye(d))
        self.p, self.m, self.c, self.t = np.zeros(k), np.zeros((k, d)), np.zeros((k, d, d)), 0

    def log_pi(self):
        with np.errstate(divide="ignore"):
            left = [np.sum(np.log(1 - self.v[:k])) for k in range(len(self.v))]
            found = np.log(self.v) + left
        if not self.closed:
            with np.errstate(under="ignore"):
                found = np.where(np.exp(found).astype(np.float32) == 0, -np.inf, found)
        return found

    def log_density(self, y):
        found = np.empty((len(y), len(self.mu)))
        for k, (mu, sigma) in enumerate(zip(self.mu, self.sigma, strict=True)):
            form = np.einsum("nd,de,ne->n", y - mu, np.linalg.inv(sigma), y - mu)
            found[:, k] = -0.5 * (form + np.linalg.slogdet(2 * np.pi * sigma)[1])
        return found

    def step(self, y):
        y, n, self.t = np.asarray(y, np.float64), len(y), self.t + 1
        joint = self.log_pi() + self.log_density(y)
        total = logsumexp(joint, axis=1)
        r = np.exp(joint - total[:, None])
        g = {"ema": self.rate, "exp": self.t**-self.rate, None: 1.0}[self.schedule]
        self.p = (1 - g) * self.p + g * r.mean(0)
        self.m = (1 - g) * self.m + g * np.einsum("nk,nd->kd", r, y) / n
        self.c = (1 - g) * self.c + g * np.einsum("nk,nd,ne->kde", r, y, y) / n
        k, d = self.mu.shape
        for i in range(k):
            self.mu[i] = self.m[i] / (self.p[i] + EPS)
            full = self.c[i] / (self.p[i] + EPS) - np.outer(self.mu[i], self.mu[i]) + self.reg * np.eye(d)
            if self.kind == "diag":
                full = np.diag(np.diag(full))
            if self.kind == "spherical":
                full = np.eye(d) * np.trace(full) / d
            self.sigma[i] = full
        after = np.array([self.p[i + 1 :].sum() for i in range(k)])
        self.v = self.p / (self.p + (self.alpha - 1) / n + after + EPS)
        if self.closed:
            self.v[-1] = 1
        if self.learn:
            a = self.alpha
            ends = [
                digamma(n * (self.p[i] + after[i]) + a + 1) - digamma(n * after[i] + a) for i in range(k - 1)
            ]
            self.alpha = max(1.0, (k - 1) / sum(ends))
        return total

    def kept(self, rescaled, threshold=1e-6):
        pi = np.exp(self.log_pi())
        found = (pi / pi.sum() if rescaled and not self.closed else pi) > threshold
        if self.closed and self.p[-1] <= EPS:
            found[-1] = False
        return found

    def score(self, y, scoring):
        y = np.asarray(y, np.float64)
        a = self.kept(scoring in ("cosine", "euclidean", "mahalanobis"))
        mu, density = self.mu[a], self.log_density(y)[:, a]
        gaps = y[:, None] - mu
        if scoring == "cosine":
            lengths = np.linalg.norm(y, axis=1)[:, None] * np.linalg.norm(mu, axis=1)
            return 1 - (y @ mu.T / lengths).max(1)
        if scoring == "euclidean":
            return np.linalg.norm(gaps, axis=2).min(1)
        if scoring == "mahalanobis":
            return np.sqrt(np.einsum("nkd,kde,nke->nk", gaps, np.linalg.inv(self.sigma[a]), gaps).min(1))
        if scoring == "likelihood":
            return -density.max(1)
        return -logsumexp(density + self.log_pi()[a], axis=1)


def near(found, expected, within=1e-5):
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=within, atol=within)


def same_parameters(found, derived, within=1e-5):
    full = derived.kind == "full"
    for name, expected in {
        "mass": derived.p,
        "first": derived.m,
        "second": derived.c if full else np.einsum("kdd->kd", derived.c),
        "sticks": derived.v,
        "concentration": derived.alpha,
        "means": derived.mu,
        "covariances": derived.sigma if full else np.einsum("kdd->kd", derived.sigma),
    }.items():
        near(getattr(found, name), expected, within)


def started(kind="diag", init="k-means++", k=7, x=None, seed=0):
    return mixture_start.start(
        rows() if x is None else x, k, init, concentration=2.0, reg_covar=1e-6, full=kind == "full", seed=seed
    )


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


def test_component_without_rows_fades_out():
    model = DPMM(n_components=8, init="first-rows", normalize=False)
    model.partial_fit(Features(torch.cat([rows(96), rows(4) + 500]).view(1, 10, 10, -1), None, (9, 9)))
    for seed in range(200):
        model.partial_fit(images(seed=seed))
    assert bool(model.state()["covariances"].isfinite().all())
    assert float(model.weights_.min()) < 1e-12
    assert model.score(images()).map.isfinite().all()


def nan_images():
    return Features(torch.full((2, 3, 3, 6), torch.nan), None, (9, 9))


def test_bad_batches_are_refused_and_nothing_is_lost():
    model = DPMM(n_components=5).partial_fit(images())
    before = {name: tensor.clone() for name, tensor in model.state().items()}
    for batch, message in (
        (nan_images(), "18 of 18 patches hold NaN"),
        (images(d=7), "fitted on features with D = 6, these have D = 7"),
        (Features(torch.zeros(0, 3, 3, 6), None, (9, 9)), "no images"),
    ):
        with pytest.raises(InputError, match=message):
            model.partial_fit(batch)
    with pytest.raises(InputError, match="18 of 18 patches hold NaN"):
        model.fit([images(), nan_images()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state().items())
    huge = Features(1e25 * images().tensor, None, (9, 9))
    with pytest.raises(InputError, match=r"step 0 of the mixture leaves the range .*normalize"):
        DPMM(n_components=5, normalize=False).partial_fit(huge)
    uneven = 1e5 * images().tensor[..., :1].expand(-1, -1, -1, 6)
    with pytest.raises(InputError, match=r"cannot be inverted .*raise reg_covar"):
        DPMM(n_components=5, normalize=False, covariance_type="full").fit([Features(uneven, None, (9, 9))])


def test_partial_fit_goes_on_from_a_saved_model(tmp_path):
    batches = [images(seed=seed) for seed in range(4)]
    whole = DPMM(n_components=6, schedule="exp", update_rate=0.7)
    for batch in batches:
        whole.partial_fit(batch)
    half = (
        DPMM(n_components=6, schedule="exp", update_rate=0.7).partial_fit(batches[0]).partial_fit(batches[1])
    )
    half.save(tmp_path / "half")
    loaded = models.load(tmp_path / "half")
    assert loaded.weight_concentration_ == half.weight_concentration_ != 2
    loaded.partial_fit(batches[2]).partial_fit(batches[3])
    assert loaded.n_iter_ == whole.n_iter_ == 4
    assert all(torch.equal(tensor, whole.state()[name]) for name, tensor in loaded.state().items())


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_components_by_channels_suffice_but_for_full(kind):
    model = DPMM(n_components=9, covariance_type=kind).partial_fit(images())
    sizes = {tuple(tensor.shape) for tensor in model.state().values()}
    wide = {(9, 6, 6)} if kind == "full" else set()
    assert sizes == {(9, 6), (9,), ()} | wide
    assert model.covariances_.shape == {"diag": (9, 6), "spherical": (9,), "full": (9, 6, 6)}[kind]


def test_tokens_are_normalized_before_they_are_resampled():
    wide = images(2, 4, 8)
    wide.tensor[:, :, ::2] *= 50
    model = DPMM(n_components=4, resample=4, n_epochs=1).fit([wide])
    unit = torch.nn.functional.normalize(wide.tensor, dim=3)
    pairs = (unit[:, :, ::2] + unit[:, :, 1::2]) / 2
    torch.testing.assert_close(model._prepared(wide.tensor), pairs)
    plain = DPMM(n_components=4, normalize=False, n_epochs=1).fit([Features(pairs, None, (24, 30))])
    torch.testing.assert_close(model.means_, plain.means_)
    torch.testing.assert_close(model.score(wide).map, plain.score(Features(pairs, None, (24, 30))).map)
    assert model.patch_scores(wide).shape == (2, 4, 4)
    assert model.score(Features(wide.tensor[:0], None, (24, 30))).map.shape == (0, 24, 30)
    mixed = DPMM(n_components=4, resample=4, n_epochs=1).fit([images(2, 4, 8), images(1, 7, 3)])
    assert mixed.score(images(1, 5, 5)).map.isfinite().all()


def test_map_is_the_scores_bilinear_and_the_image_score_their_top_percent():
    model = DPMM(n_components=6).fit([images()])
    query = images(2, 12, 25, seed=8)
    patches, scores = model.patch_scores(query), model.score(query)
    expected = torch.nn.functional.interpolate(patches[:, None], (24, 30), mode="bilinear")[:, 0]
    torch.testing.assert_close(scores.map, expected)
    torch.testing.assert_close(scores.score, patches.flatten(1).topk(3).values.mean(1))


def test_assignment_tells_clusters_apart_also_at_the_size_of_the_image():
    kinds = torch.eye(6)[:3] * 10
    layout = torch.randint(3, (4, 6, 5), generator=torch.Generator().manual_seed(0))
    noise = 0.1 * torch.randn(4, 6, 5, 6, generator=torch.Generator().manual_seed(1))
    model = DPMM(n_components=3, n_epochs=3).fit([Features(kinds[layout] + noise, None, (24, 10))])
    labels = model.assign(Features(kinds[layout] + noise, None, (24, 10)))
    assert labels.dtype == torch.int64
    names = {(int(a), int(b)) for a, b in zip(layout.flatten(), labels.flatten(), strict=True)}
    assert len(names) == 3
    pixels = model.assign(Features(kinds[layout] + noise, None, (24, 10)), pixels=True)
    assert torch.equal(pixels, labels.repeat_interleave(4, 1).repeat_interleave(2, 2))
    odd = model.assign(Features(kinds[layout] + noise, None, (7, 3)), pixels=True)
    assert torch.equal(odd[:, 3, 1], labels[:, 2, 1])


KILLED = """
import os, runpy, signal
from dinofast.models.dpmm import DPMM
file = runpy.run_path({file!r})
DPMM.checkpoint_steps = 2
def die(stage, done, total):
    if done == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
file["resumable"]().fit([file["images"](9)], validation={validation}, checkpoint={path!r}, progress=die)
"""


def resumable():
    return DPMM(n_components=15, n_epochs=4, batch_size=2, update_rate=0.9, seed=3)


@pytest.mark.parametrize("validated", [True, False], ids=["validated", "plain"])
def test_run_killed_within_an_epoch_goes_on_to_the_same_numbers(tmp_path, validated):
    """Of five steps an epoch, the kill comes in the fourth of the third: in step 14, saved after step 12."""
    path = str(tmp_path / "run")
    held_back = "[file['images'](3, seed=50)]" if validated else "None"
    code = KILLED.format(file=__file__, at=14, path=path, validation=held_back)
    killed = subprocess.run([sys.executable, "-c", code])
    assert killed.returncode == -signal.SIGKILL
    told = []
    validation = [images(3, seed=50)] if validated else None
    model = resumable()
    model.fit([images(9)], validation=validation, checkpoint=path, progress=lambda *a: told.append(a))
    assert [done for _, done, _ in told] == list(range(13, 21))
    expected = resumable().fit([images(9)], validation=validation)
    assert set(expected.state()) == set(model.state())
    assert all(torch.equal(tensor, model.state()[name]) for name, tensor in expected.state().items())
    finished = resumable().fit([images(9)], validation=validation, checkpoint=path)
    assert all(torch.equal(tensor, model.state()[name]) for name, tensor in finished.state().items())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_components": 0}, "n_components must be a whole number, at least 1"),
        ({"batch_size": 1.5}, "batch_size must be"),
        ({"patience": 0}, "patience must be"),
        ({"resample": True}, "resample must be"),
        ({"seed": -1}, "seed must be"),
        ({"covariance_type": "tied"}, "unknown covariance_type 'tied'; one of diag, spherical, full"),
        ({"schedule": "poly"}, "unknown schedule 'poly'; one of ema, exp, or None"),
        ({"init": "random"}, "unknown init"),
        ({"scoring": "l1"}, "unknown scoring"),
        ({"compat": "code"}, "unknown compat"),
        ({"update_rate": 0.0}, "update_rate must be a finite number, in"),
        ({"update_rate": "a"}, "update_rate must be a finite number, in .* got 'a'"),
        ({"seed": 2**63}, "seed must be"),
        ({"weight_concentration": 0.5}, "weight_concentration must be"),
        ({"weight_threshold": 1.0}, "weight_threshold must be"),
        ({"reg_covar": -1.0}, "reg_covar must be"),
        ({"eps": 0.0}, "eps must be"),
    ],
)
def test_parameters_out_of_range_are_refused(params, message):
    with pytest.raises(InputError, match=message):
        DPMM(**params)


def test_state_of_another_kind_is_refused():
    state = DPMM(n_components=5).partial_fit(images()).state()
    for model, changed, message in (
        (DPMM(n_components=6), state, "first of a mixture of 6 components must be"),
        (DPMM(n_components=5, covariance_type="full"), state, r"must be torch.float32 \(5, 6, 6\)"),
        (DPMM(n_components=5), {n: t for n, t in state.items() if n != "mass"}, "a mixture holds"),
        (DPMM(n_components=5), {n: t for n, t in state.items() if n != "lower_bound"}, "lower_bound"),
        (
            DPMM(n_components=5),
            state | {"sticks": state["sticks"].float()},
            "sticks .* must be torch.float64",
        ),
    ):
        with pytest.raises(ArtifactError, match=message):
            model.load_state(changed)


def test_a_large_seed_shuffles_epochs():
    batch = Features(torch.randn(3, 2, 2, 4, generator=torch.Generator().manual_seed(0)), None, (8, 8))
    large = DPMM(n_components=2, n_epochs=2, seed=2**63 - 1).fit([batch])
    assert large.n_iter_ == 2
    assert DPMM(n_components=2, n_epochs=2, seed=2**44).fit([batch]).n_iter_ == 2
