"""The published mixture's class: steps, scores and states held to its equations written out in NumPy."""

import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from dpmm_host import EPS, KINDS, D, Host, K, logs, model, rows
from scipy.special import logsumexp

from dinofast.drop_in.anomalydino_dpmm import DPMM
from dinofast.errors import InputError


@pytest.mark.parametrize("learn", [True, False], ids=["learned", "fixed"])
@pytest.mark.parametrize(("schedule", "rate"), [("ema", 0.2), ("exp", 0.6), ("ema", None)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_state_and_batch_give_the_same_next_state(kind, schedule, rate, learn):
    ours = model(kind, steps=0, schedule=schedule, update_rate=rate, alpha_fixed=not learn)
    for t in range(4):
        host = Host(ours.state_dict(), ours.alpha, kind, schedule, rate, learn)
        batch = rows(300 - 40 * t, seed=t)
        ours.step(batch)
        host.step(batch)
        host.same(ours)
    assert (float(ours.alpha) == 2.0) != learn


@pytest.mark.parametrize("kind", KINDS)
def test_e_step_and_m_step_are_the_step(kind):
    ours, batch = model(kind), rows(200, seed=7)
    host = Host(ours.state_dict(), ours.alpha, kind, "ema", 0.2)
    log_r = ours.e_step(batch)
    twin = model(kind)
    r = host.step(batch)
    np.testing.assert_allclose(np.exp(log_r), r, atol=1e-5)
    ours.m_step(batch, np.exp(log_r))
    host.same(ours)
    twin.m_step(batch, log_r)
    host.same(twin)


def test_logarithms_above_zero_by_rounding_are_logarithms():
    shares = np.eye(K)[[0, 1, 2, 3]] * (1 - 1e-7) + 1e-9
    exact, rounded, batch = model(), model(), rows(4)
    exact.m_step(batch, shares)
    rounded.m_step(batch, np.where(shares > 0.5, 1e-7, np.log(shares)))
    torch.testing.assert_close(rounded.mean, exact.mean)


def test_one_component_has_logarithms_of_zero():
    ours, twin, batch = model(k=1), model(k=1), rows(9)
    ours.m_step(batch, ours.e_step(batch))
    twin.m_step(batch, np.ones((9, 1)))
    assert torch.equal(ours.mean, twin.mean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mean", math.nan, "mean holds NaN or infinite"),
        ("v", math.inf, "v holds NaN or infinite"),
        ("cov", math.nan, "cov holds NaN"),
        ("cov", -1.0, "cov of component 2 is not positive definite"),
        ("cov", 0.0, "cov of component 2 is not positive definite"),
    ],
)
def test_states_that_are_no_mixture_are_refused_by_name(kind, key, value, message):
    ours = model(kind)
    before, state = ours.state_dict(), ours.state_dict()
    state[key][2] = value * torch.eye(D) if key == "cov" and value <= 0 else value
    with pytest.raises(InputError, match=message):
        ours.load_state_dict(state)
    with pytest.raises(InputError, match="alpha must be finite"):
        ours.load_state_dict(before | {"alpha": math.nan})
    assert all(np.array_equal(before[name], value) for name, value in ours.state_dict().items())


def test_a_concentration_below_one_is_the_hosts():
    centers = np.array([[2.0] * D, [-2.0] * D], np.float32)
    batch = np.repeat(centers, [140, 60], axis=0) + 0.1 * rows(200)
    ours = DPMM(2, D, 0.2, cov_type="diag")
    torch.manual_seed(0)
    ours.initialize(batch[[0, 199]])
    for _ in range(4):
        host = Host(ours.state_dict(), ours.alpha, "diag", "ema", 0.2)
        ours.step(batch)
        host.step(batch)
        host.same(ours)
    assert float(ours.alpha) < 1
    assert float(ours.v[-1]) > 1


def test_negative_sticks_of_the_host_stay_numbers():
    ours = model(k=4, steps=3)
    ours.alpha, batch = 0.05, rows(1)
    host = Host(ours.state_dict(), ours.alpha, "diag", "ema", 0.2)
    ours.step(batch)
    with np.errstate(invalid="ignore", divide="ignore"):
        host.step(batch)
        assert np.isnan(host.log_pi()).any()
    assert host.v.min() < 0
    assert float(ours.v.min()) >= 0
    assert bool(ours.calculate_pi().isfinite().all())


def test_sticks_that_are_nan_in_the_host_stay_numbers():
    batch = rows(50)
    ours = model(k=3, steps=0, x=batch)
    state = ours.state_dict()
    state["mean"][1:] = 1e3
    ours.load_state_dict(state)
    for _ in range(6):
        ours.alpha = 0.3
        ours.step(batch)
    host = Host(state, 0.3, "diag", "ema", 0.2)
    with np.errstate(invalid="ignore"):
        host.step(batch)
        assert np.isnan(host.log_pi()).any()
    assert bool(ours.calculate_pi().isfinite().all())
    assert float(ours.calculate_pi()[0]) == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_densities_and_scores_are_the_published_ones(kind):
    ours, y = model(kind, steps=3), rows(40, seed=50)
    host = Host(ours.state_dict(), ours.alpha, kind, "ema", 0.2)
    wide = y.astype(np.float64)
    density, joint, log_pi = host.log_density(wide), host.joint(wide), host.log_pi()

    def near(found, expected):
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5)

    np.testing.assert_allclose(ours.calculate_log_pi(), log_pi, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.calculate_pi(), np.exp(log_pi) / np.exp(log_pi).sum(), rtol=1e-5)
    near(ours.get_log_prob(y), density)
    near(ours.get_log_prob(y[:, None]), density)
    near(ours.get_weighted_log_prob(y), joint)
    near(ours.get_log_responsibilities(y), joint - logsumexp(joint, axis=1, keepdims=True))
    near(ours.get_responsibilities(y), np.exp(joint - logsumexp(joint, axis=1, keepdims=True)))
    near(ours.sample_score(y), logsumexp(joint, axis=1))
    np.testing.assert_allclose(ours.score(y), logsumexp(joint, axis=1).mean(), rtol=1e-5)
    gap = wide[:, None] - host.mu
    euclidean = np.linalg.norm(gap, axis=2)
    mahalanobis = np.sqrt(np.einsum("nkd,kde,nke->nk", gap, np.linalg.inv(host.sigma), gap))
    length = np.linalg.norm(wide, axis=1)[:, None] * np.linalg.norm(host.mu, axis=1)
    cosine = 1 - wide @ host.mu.T / length
    near(ours.distance_to_nearest_cluster(y, 1e-6, False, True), euclidean.min(1))
    near(ours.distance_to_nearest_cluster(y, 1e-6, False, False), euclidean)
    near(ours.distance_to_nearest_cluster(y, 1e-6, True, True), mahalanobis.min(1))
    near(ours.distance_to_nearest_cluster(y, 1e-6, True, False), mahalanobis)
    near(ours.cosine_distance_to_nearest_cluster(y, 1e-6), cosine.min(1))
    near(ours.cosine_distance_to_nearest_cluster(y, 1e-6, return_min=False), cosine)


def test_distances_choose_by_scaled_weights_and_likelihoods_by_unscaled_ones():
    ours, y = model(), torch.from_numpy(rows(9))
    state = ours.state_dict()
    state["v"] = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1])
    ours.load_state_dict(state)
    host = Host(state, 2.0, "diag", "ema", 0.2)
    pi = np.exp(host.log_pi())
    threshold = 0.16  # unscaled all weights lie below, scaled all above
    assert pi.max() < threshold < (pi / pi.sum()).min()
    assert bool(ours.cosine_distance_to_nearest_cluster(y, threshold, False).isfinite().all())
    assert bool(ours.distance_to_nearest_cluster(y, threshold, return_min=False).isfinite().all())
    assert bool((ours.get_log_prob(y, threshold) == -torch.inf).all())
    with pytest.raises(InputError, match="no component has a weight above"):
        ours.sample_score(y, threshold)
    threshold = 0.085
    kept = pi > threshold
    assert kept.tolist() == [True, True, False, False, False]
    expected = logsumexp(host.joint(y.double().numpy())[:, kept], axis=1)
    np.testing.assert_allclose(ours.sample_score(y, threshold), expected, rtol=1e-5)
    for found in (ours.get_weighted_log_prob(y, threshold), ours.get_log_responsibilities(y, threshold)):
        assert bool(((found == -torch.inf) == ~torch.from_numpy(kept)).all())
    left = 0.2
    near = ours.distance_to_nearest_cluster(y, left, return_min=False)
    gone = pi / pi.sum() <= left
    assert 0 < gone.sum() < K
    assert bool((near.isinf() == torch.from_numpy(gone)).all())
    torch.testing.assert_close(ours.distance_to_nearest_cluster(y, left), near.min(1).values)


def test_a_weight_of_zero_in_float32_takes_no_part():
    torch.manual_seed(1)
    ours = DPMM(160, D, 0.2, cov_type="diag")
    ours.initialize(rows())
    state = ours.state_dict()
    state["v"][:] = 0.5
    ours.load_state_dict(state)
    assert bool(ours.calculate_log_pi().isfinite().all())
    assert (ours.get_weighted_log_prob(rows(3)) == -np.inf).any(0).nonzero()[0].min() == 149
    ours.step(rows(20))
    assert float(ours.resp_stat[:149].min()) > 0 or float(ours.resp_stat[149:].max()) == 0


def test_start_is_the_hosts():
    x = rows(60)
    ours = model(k=8, steps=0, x=x)
    assert {tuple(row) for row in ours.mean.tolist()} == {tuple(row) for row in x[:8].tolist()}
    variance = x.astype(np.float64).var(0, ddof=1) + 1e-6
    np.testing.assert_allclose(ours.cov, np.broadcast_to(np.diag(variance), (8, D, D)), rtol=1e-5)
    assert float(ours.v[-1]) == 1
    assert ours.iterations == 0
    assert float(ours.resp_stat.abs().sum()) == 0
    assert not torch.equal(ours.mean, model(k=8, steps=0, x=x, seed=1).mean)
    ours.initialize()
    assert tuple(ours.mean.shape) == (8, D)
    ours.step(x)
    assert bool(ours.mean.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_rows_have_the_moments_of_the_mixture(kind):
    ours = model(kind, steps=4)
    torch.manual_seed(3)
    drawn = ours.sample(40000).double()
    pi, mu = ours.calculate_pi().double(), ours.mean.double()
    mean = pi @ mu
    second = (pi[:, None, None] * (ours.cov.double() + mu[:, :, None] * mu[:, None])).sum(0)
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), second, atol=0.06, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_states_go_out_and_in_with_the_hosts_keys_and_shapes(kind, tmp_path):
    ours = model(kind, steps=3)
    torch.save(ours.state_dict() | {"alpha": ours.alpha}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    shapes = {"resp_stat": (K,), "mean_stat": (K, D), "cov_stat": (K, D, D), "v": (K,)}
    shapes |= {"mean": (K, D), "cov": (K, D, D)}
    plain = ours.state_dict()
    assert set(plain) == {"iterations", *shapes}
    assert {key: tuple(plain[key].shape) for key in shapes} == shapes
    twin = DPMM(K, D, 0.2, cov_type=kind)
    twin.load_state_dict(plain)
    assert float(twin.alpha) == 2
    twin.load_state_dict(state)
    assert float(twin.alpha) == pytest.approx(float(ours.alpha))
    later = rows(seed=9)
    ours.step(later)
    twin.step(later)
    for key in shapes:
        torch.testing.assert_close(twin.state_dict()[key], ours.state_dict()[key], rtol=1e-5, atol=1e-6)
    again = DPMM(K, D, 0.2, cov_type=kind)
    again.load_state_dict({key: np.asarray(value) for key, value in plain.items()})
    assert torch.equal(again.mean, torch.from_numpy(np.asarray(plain["mean"])))
    plain["mean"] += 1
    assert not torch.equal(again.mean, plain["mean"])


def test_defaults_are_the_hosts():
    ours = DPMM(3, 2)
    rule = ours._rule
    assert (rule.update_rate, rule.schedule, rule.learn_concentration) == (None, "ema", True)
    assert (float(ours.alpha), rule.eps, rule.reg_covar) == (2.0, EPS, 1e-6)
    assert (ours.cov_type, str(ours.device)) == ("full", "cpu")
    ours.alpha = 3
    ours.initialize(rows(9, 2))
    assert float(ours.alpha) == 3
    ours.alpha = torch.tensor(7.5)
    assert float(ours.alpha) == 7.5
    assert ours._state.second.shape == (3, 2, 2)
    assert model("diag")._state.second.shape == (K, D)
    assert model("spherical")._state.covariances.shape == (K, D)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DPMM(0, 3), "K and D must be at least 1"),
        (lambda: DPMM(3, 3, cov_type="tied"), "one of full, diag, spherical"),
        (lambda: DPMM(3, 3, alpha=0.5), "alpha must be finite and at least 1"),
        (lambda: DPMM(3, 3, schedule="cosine"), "unknown schedule"),
        (lambda: DPMM(3, 3).step(rows(4, 3)), "call initialize or load_state_dict first"),
        (lambda: model().step(rows(4, 3)), r"rows must be \(N, 4\)"),
        (lambda: model().step(rows(0)), "no rows to learn from"),
        (lambda: model().initialize(rows(0)), "give initialize the first batch"),
        (lambda: model().step(rows() * math.nan), "leaves the range"),
        (lambda: model().m_step(rows(4), rows(4)), r"resp must be \(4, 5\)"),
        (lambda: model().m_step(rows(4) * math.nan, np.full((4, K), 1 / K)), "NaN or infinite"),
        (lambda: model().m_step(rows(4), np.ones((4, K))), "taken for responsibilities: row 0 sums to 5 "),
        (lambda: model().m_step(rows(4), np.zeros((4, K))), "taken for logarithms: row 0 sums to 5 "),
        (lambda: model().m_step(rows(4), np.full((4, K), math.nan)), "row 0 sums to nan"),
        (
            lambda: model().m_step(rows(4), logs([0.6, 0.2, 0.1, 0.05, 0.02])),
            "logarithms: row 3 sums to 0.97 ",
        ),
        (lambda: model().m_step(rows(4), np.log([[1e-9, 2, 1, 1, 1]] * 4)), "logarithms: row 0 sums to 5 "),
        (lambda: setattr(model(), "alpha", 0), "above 0"),
        (lambda: DPMM(3, 3).load_state_dict({"v": rows(3)}), "has no cov, cov_stat"),
        (
            lambda: DPMM(4, D).load_state_dict(model().state_dict()),
            r"resp_stat must be \(4,\), got \(5,\)",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_refused_batch_leaves_the_state():
    ours = model()
    before = ours.state_dict()
    with pytest.raises(InputError):
        ours.step(rows() * np.nan)
    assert all(np.array_equal(before[key], value) for key, value in ours.state_dict().items())


def test_the_example_agrees_with_the_equations(capsys):
    path = Path(__file__).parents[1] / "examples" / "anomalydino_dpmm.py"
    if not path.is_file():
        pytest.skip("examples/ is not beside the tests")
    found = runpy.run_path(str(path))["main"](rows=200, components=9, channels=8)
    assert max(found.values()) < 1e-5
    assert "largest difference" in capsys.readouterr().out
