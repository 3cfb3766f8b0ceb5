"""scikit-learn's mixtures against scikit-learn itself."""

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn import mixture
from sklearn.exceptions import ConvergenceWarning
from sklearn_rows import rows

from dinofast.drop_in.sklearn import BayesianGaussianMixture

KINDS = ("full", "diag", "spherical")


ATTRIBUTES = (
    "weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_", "mean_precision_",
    "degrees_of_freedom_", "weight_concentration_", "weight_concentration_prior_", "mean_precision_prior_",
    "mean_prior_", "degrees_of_freedom_prior_", "covariance_prior_",
)  # fmt: skip


def same_mixture(ours, host, within=1e-9):
    for name in ATTRIBUTES:
        np.testing.assert_allclose(
            getattr(ours, name), getattr(host, name), rtol=within, atol=within, err_msg=name
        )


@pytest.mark.parametrize("init", ["kmeans", "k-means++", "random", "random_from_data"])
@pytest.mark.parametrize("kind", KINDS)
def test_mixtures_are_scikit_learns(kind, init):
    x, asked = rows(), rows(60, seed=3)
    params = {
        "n_components": 7, "covariance_type": kind, "init_params": init, "random_state": 2, "n_init": 2,
        "max_iter": 200,
    }  # fmt: skip
    ours, host = BayesianGaussianMixture(**params).fit(x), mixture.BayesianGaussianMixture(**params).fit(x)
    assert (ours.n_iter_, ours.converged_) == (host.n_iter_, True)
    assert ours.lower_bound_ == pytest.approx(host.lower_bound_, abs=1e-7)
    assert (np.diff(ours.lower_bounds_) > -1e-7).all()
    same_mixture(ours, host)
    np.testing.assert_allclose(ours.score_samples(asked), host.score_samples(asked), rtol=1e-9)
    np.testing.assert_allclose(ours.predict_proba(asked), host.predict_proba(asked), atol=1e-9)
    np.testing.assert_array_equal(ours.predict(asked), host.predict(asked))
    assert ours.score(asked) == pytest.approx(host.score(asked))
    for found, expected in zip(ours.sample(50), host.sample(50), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(BayesianGaussianMixture(**params).fit_predict(x), host.predict(x))


@pytest.mark.parametrize("kind", KINDS)
def test_mixtures_of_float32_rows_agree_to_its_precision(kind):
    params = {"n_components": 7, "covariance_type": kind, "random_state": 2, "max_iter": 200}
    x = rows(dtype=np.float32)
    ours = BayesianGaussianMixture(**params).fit(x)
    host = mixture.BayesianGaussianMixture(**params).fit(x.astype(np.float64))
    same_mixture(ours, host, within=2e-3)
    assert ours.lower_bound_ == pytest.approx(host.lower_bound_, abs=1e-2)
    found = ours.score_samples(x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, host.score_samples(x), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_mixtures_take_scikit_learns_priors(kind):
    d = 5
    scale = {"full": 0.3 * np.eye(d) + 0.1, "diag": np.linspace(0.1, 1, d), "spherical": 0.4}[kind]
    params = {
        "n_components": 6, "covariance_type": kind, "weight_concentration_prior": 3.0, "random_state": 0,
        "mean_precision_prior": 0.2, "mean_prior": np.arange(d), "degrees_of_freedom_prior": 7.5,
        "covariance_prior": scale, "reg_covar": 1e-2, "max_iter": 300,
    }  # fmt: skip
    x = rows(200)
    same_mixture(BayesianGaussianMixture(**params).fit(x), mixture.BayesianGaussianMixture(**params).fit(x))


def test_a_warm_start_goes_on():
    x = rows()
    params = {
        "n_components": 7,
        "random_state": 0,
        "max_iter": 3,
        "warm_start": True,
        "init_params": "random",
    }
    ours, host = BayesianGaussianMixture(**params), mixture.BayesianGaussianMixture(**params)
    for _ in range(3):
        with pytest.warns(ConvergenceWarning, match="converge"):
            ours.fit(x)
        with pytest.warns(ConvergenceWarning):
            host.fit(x)
        same_mixture(ours, host)


@pytest.mark.parametrize("kind", KINDS)
def test_partial_fit_adds_the_responsibilities_of_every_batch(kind):
    parts = [rows(150), rows(90, seed=5), rows(60, seed=6)]
    params = {"n_components": 6, "covariance_type": kind, "random_state": 0, "init_params": "random"}
    ours = BayesianGaussianMixture(**params)
    host = mixture.BayesianGaussianMixture(**params, max_iter=1)
    with pytest.warns(ConvergenceWarning):
        host.fit(parts[0])
    once = BayesianGaussianMixture(**params).partial_fit(parts[0])
    same_mixture(once, host)
    assert once.lower_bound_ == pytest.approx(host.lower_bound_)
    prior = {name: getattr(host, name) for name in ATTRIBUTES if name.endswith("_prior_")}
    start = mixture.BayesianGaussianMixture(**params)
    start._check_parameters(parts[0])
    start._initialize_parameters(parts[0], np.random.RandomState(0))
    seen, shares = parts[0], start._e_step(parts[0])[1]
    ours.partial_fit(parts[0])
    for part in parts[1:]:
        joint = host._estimate_weighted_log_prob(part)
        shares = np.vstack([shares, joint - logsumexp(joint, axis=1, keepdims=True)])
        seen = np.vstack([seen, part])
        host._m_step(seen, shares)
        host._set_parameters(host._get_parameters())
        ours.partial_fit(part)
        same_mixture(ours, host)
        assert {name: getattr(ours, name) for name in prior}.keys() == prior.keys()
        assert ours.lower_bound_ == pytest.approx(host._compute_lower_bound(shares, None))
    assert (ours.n_iter_, ours.converged_) == (3, False)


def test_partial_fit_goes_on_from_a_fit_and_raises_the_bound():
    x = rows()
    ours = BayesianGaussianMixture(n_components=6, random_state=0, max_iter=200).fit(x)
    weights = ours.weight_concentration_[0].sum()
    ours.partial_fit(rows(50, seed=9))
    assert ours.weight_concentration_[0].sum() == pytest.approx(weights + 50)
    stream = BayesianGaussianMixture(n_components=6, random_state=0)
    for start in range(0, 400, 100):
        stream.partial_fit(x[start : start + 100])
    assert stream.score(x) == pytest.approx(ours.score(x), abs=0.5)
