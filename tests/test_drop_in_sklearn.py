"""scikit-learn's names against scikit-learn itself from the same starts, and by its own checks."""

import pickle
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import cluster, neighbors
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn_rows import DTYPES, rows

from dinofast.drop_in.sklearn import BayesianGaussianMixture, KMeans, NearestNeighbors
from dinofast.errors import InputError

FAILING = {
    "KMeans": {
        "check_sample_weight_equivalence_on_dense_data": "weighted rows change what k-means++ draws, as they "
        "do in scikit-learn's own KMeans, which fails it, too",
    }
}
"""Estimator -> check that it fails -> why."""


@parametrize_with_checks(
    [
        NearestNeighbors(),
        NearestNeighbors(metric="cosine"),
        KMeans(n_clusters=3),
        BayesianGaussianMixture(n_components=2),
        BayesianGaussianMixture(n_components=2, covariance_type="diag"),
        BayesianGaussianMixture(n_components=2, covariance_type="spherical"),
    ],
    expected_failed_checks=lambda estimator: FAILING.get(type(estimator).__name__, {}),
)
def test_estimators_pass_scikit_learns_checks(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def same_neighbors(found, expected, space, queries, metric):
    """Distances agree by rank, and every named row lies at the distance of its rank."""
    (distance, index), (truth, _) = found, expected
    np.testing.assert_allclose(distance, truth, rtol=1e-5, atol=1e-6)
    exact = neighbors.NearestNeighbors(n_neighbors=len(space), metric=metric).fit(space.astype(np.float64))
    every, order = exact.kneighbors(queries.astype(np.float64))
    by_row = np.take_along_axis(every, order.argsort(1), 1)
    np.testing.assert_allclose(np.take_along_axis(by_row, index, 1), truth, rtol=1e-5, atol=1e-6)
    assert all(len(set(row)) == len(row) for row in index.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ["cosine", "euclidean", "minkowski", "l2"])
def test_neighbors_are_scikit_learns(metric, dtype):
    space, queries = rows(300, dtype=dtype), rows(40, seed=1, dtype=dtype)
    space[10:14] = space[3]  # ties
    ours = NearestNeighbors(n_neighbors=7, metric=metric).fit(space)
    host = neighbors.NearestNeighbors(n_neighbors=7, metric=metric, algorithm="brute").fit(space)
    for k in (None, 1, 300):
        found = ours.kneighbors(queries, k)
        same_neighbors(found, host.kneighbors(queries, k), space, queries, metric)
        np.testing.assert_array_equal(found[1], ours.kneighbors(queries, k, return_distance=False))
    same_neighbors(ours.kneighbors(), host.kneighbors(), space, space, metric)
    assert not (ours.kneighbors()[1] == np.arange(300)[:, None]).any()
    names = ("n_features_in_", "n_samples_fit_", "effective_metric_")
    assert [getattr(ours, n) for n in names] == [getattr(host, n) for n in names]


def test_a_row_among_more_equal_rows_than_neighbors_is_not_its_own_neighbor_twice():
    space = np.zeros((9, 2))
    distance, index = NearestNeighbors(n_neighbors=3).fit(space).kneighbors()
    assert not distance.any()
    assert all(len(set(row)) == 3 for row in index.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("metric", "radius"), [("cosine", 0.2), ("euclidean", 2.5), ("euclidean", 30.0)])
def test_neighbors_within_a_radius_are_scikit_learns(metric, radius, dtype):
    space, queries = rows(300, dtype=dtype), rows(40, seed=1, dtype=dtype)
    ours = NearestNeighbors(radius=radius, metric=metric).fit(space)
    host = neighbors.NearestNeighbors(radius=radius, metric=metric, algorithm="brute").fit(space)
    for asked in (queries, None):
        distance, index = ours.radius_neighbors(asked)
        truth, number = host.radius_neighbors(asked)
        counts = {len(row) for row in number}
        assert len(counts) > 5 or counts == {300 - (asked is None)}
        for row in range(len(number)):
            order = number[row].argsort()
            np.testing.assert_array_equal(index[row], number[row][order])
            np.testing.assert_allclose(distance[row], truth[row][order], rtol=1e-4, atol=1e-5)
        ordered, _ = ours.radius_neighbors(asked, sort_results=True)
        assert all((np.diff(row) >= 0).all() for row in ordered)
        for mode in ("connectivity", "distance"):
            for graph in ("radius_neighbors_graph", "kneighbors_graph"):
                found, expected = (getattr(e, graph)(asked, mode=mode) for e in (ours, host))
                assert found.shape == expected.shape
                np.testing.assert_allclose(found.toarray(), expected.toarray(), rtol=1e-4, atol=1e-5)
    one = ours.radius_neighbors(queries[:1], radius=0.0, return_distance=False)
    assert one[0].tolist() == []


def test_a_prepared_bank_serves_and_survives_pickling():
    space, queries = rows(6000, 32, dtype=np.float32), rows(9, 32, seed=1, dtype=np.float32)
    for metric in ("cosine", "euclidean"):
        ours = NearestNeighbors(metric=metric).fit(space)
        host = neighbors.NearestNeighbors(metric=metric, algorithm="brute").fit(space)
        found = ours.kneighbors(queries)
        np.testing.assert_allclose(found[0], host.kneighbors(queries)[0], rtol=1e-4, atol=1e-5)
        again = pickle.loads(pickle.dumps(ours)).kneighbors(queries)
        np.testing.assert_array_equal(again[0], found[0])
        np.testing.assert_array_equal(again[1], found[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", ["k-means++", "random", "array", "function"])
@pytest.mark.parametrize("weighted", [False, True])
def test_clusters_are_scikit_learns(init, weighted, dtype):
    x, asked = rows(dtype=dtype), rows(50, seed=1, dtype=dtype)
    weights = np.random.default_rng(2).integers(0, 3, len(x)).astype(float) if weighted else None
    start = {"array": x[:9], "function": lambda X, k, random_state: X[random_state.permutation(len(X))[:k]]}
    params = {"n_clusters": 9, "init": start.get(init, init), "random_state": 4}
    if init in ("random", "k-means++"):
        params["n_init"] = 3
    ours = KMeans(**params).fit(x, sample_weight=weights)
    host = cluster.KMeans(**params).fit(x, sample_weight=weights)
    np.testing.assert_array_equal(ours.labels_, host.labels_)
    assert ours.labels_.dtype == np.int32
    assert ours.inertia_ == pytest.approx(host.inertia_, rel=1e-5)
    assert ours.n_iter_ == host.n_iter_
    np.testing.assert_allclose(ours.cluster_centers_, host.cluster_centers_, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(ours.predict(asked), host.predict(asked))
    np.testing.assert_allclose(ours.transform(asked), host.transform(asked), rtol=1e-4, atol=1e-5)
    assert ours.transform(asked).dtype == dtype
    asked_weights = None if weights is None else weights[:50]
    assert ours.score(asked, sample_weight=asked_weights) == pytest.approx(
        host.score(asked, sample_weight=asked_weights), rel=1e-4
    )
    np.testing.assert_array_equal(KMeans(**params).fit_predict(x, sample_weight=weights), host.labels_)


def test_clusters_end_by_the_tolerance_relative_to_the_variance():
    x = 1000 * rows(2000)
    iterations = set()
    for tol in (0.0, 1e-4, 1e-2, 1.0):
        params = {"n_clusters": 12, "init": "random", "n_init": 1, "random_state": 0, "tol": tol}
        ours, host = KMeans(**params).fit(x), cluster.KMeans(**params).fit(x)
        assert ours.n_iter_ == host.n_iter_
        assert ours.inertia_ == pytest.approx(host.inertia_)
        iterations.add(ours.n_iter_)
    assert len(iterations) > 2


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("empty", [1, 3])
def test_empty_clusters_move_where_scikit_learn_moves_them(empty, weighted):
    x = rows(60)
    weights = np.arange(1.0, 61) if weighted else None
    start = np.vstack([x[:3], np.full((empty, 5), 500.0)])
    for max_iter in (1, 50):
        params = {"n_clusters": 3 + empty, "init": start, "n_init": 1, "max_iter": max_iter}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            ours = KMeans(**params).fit(x, sample_weight=weights)
            host = cluster.KMeans(**params).fit(x, sample_weight=weights)
        order = (np.lexsort(e.cluster_centers_.T) for e in (ours, host))
        found, expected = (e.cluster_centers_[o] for e, o in zip((ours, host), order, strict=True))
        np.testing.assert_allclose(found, expected)
        assert np.abs(found).max() < 100
        assert ours.inertia_ == pytest.approx(host.inertia_)


def test_fewer_different_rows_than_clusters_are_told():
    x = np.repeat([[3.0, 5.0], [-2.0, 4.0]], 10, axis=0)
    with pytest.warns(ConvergenceWarning, match="2 distinct clusters found for n_clusters = 4"):
        ours = KMeans(4, random_state=0).fit(x)
    assert ours.inertia_ == 0
    assert {tuple(center) for center in ours.cluster_centers_} == {tuple(row) for row in x}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_go_in_and_come_out(dtype):
    x = torch.from_numpy(rows()).to(dtype)
    plain = x.to(torch.float64 if dtype == torch.float64 else torch.float32).numpy()
    searched = NearestNeighbors(metric="cosine").fit(x).kneighbors(x[:9])
    kmeans = KMeans(6, random_state=0).fit(x)
    mixed = BayesianGaussianMixture(n_components=6, random_state=0, covariance_type="diag").fit(x)
    found = (*searched, kmeans.labels_, kmeans.transform(x), mixed.predict(x), mixed.score_samples(x))
    assert all(isinstance(part, torch.Tensor) for part in (*found, kmeans.cluster_centers_))
    expected = NearestNeighbors(metric="cosine").fit(plain).kneighbors(plain[:9])
    np.testing.assert_allclose(searched[0], expected[0], atol=1e-6)
    labels = KMeans(6, random_state=0).fit(plain).labels_
    np.testing.assert_array_equal(kmeans.labels_, labels)
    twin = BayesianGaussianMixture(n_components=6, random_state=0, covariance_type="diag").fit(plain)
    np.testing.assert_allclose(mixed.means_, twin.means_, rtol=1e-4, atol=1e-4)
    fitted = NearestNeighbors().fit(x)
    for asked in (x[:2], None):
        assert isinstance(fitted.radius_neighbors(asked)[0][0], torch.Tensor)
        assert isinstance(fitted.kneighbors(asked)[0], torch.Tensor)
    assert isinstance(fitted.kneighbors(plain[:2])[0], np.ndarray)
    assert fitted.kneighbors_graph().shape == (400, 400)
    for broken in (x[:, :3], x * torch.nan, x[0]):
        with pytest.raises(ValueError, match=r"features|NaN|matrix"):
            kmeans.predict(broken)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: NearestNeighbors(metric="manhattan").fit(x), "metric must be one of cosine"),
        (lambda x: NearestNeighbors(p=1).fit(x), "only p = 2"),
        (lambda x: NearestNeighbors(n_neighbors=0).fit(x), "n_neighbors must be a whole number"),
        (lambda x: NearestNeighbors().fit(x).kneighbors(x, len(x) + 1), "Expected n_neighbors <= n_samples"),
        (lambda x: NearestNeighbors().fit(x).kneighbors(None, len(x)), "there are 29 rows to choose from"),
        (lambda x: NearestNeighbors().fit(x).radius_neighbors(x, -1.0), "radius must be a number from 0"),
        (lambda x: NearestNeighbors().fit(x).radius_neighbors(x, 1, False, True), "needs return_distance"),
        (lambda x: NearestNeighbors().fit(x).kneighbors_graph(x, mode="both"), "mode must be one of"),
        (lambda x: KMeans(31).fit(x), "n_samples=30 should be >= n_clusters=31"),
        (lambda x: KMeans(3, init="farthest").fit(x), "init must be one of"),
        (lambda x: KMeans(3, init=x[:4]).fit(x), r"centers \(3, 5\), got \(4, 5\)"),
        (lambda x: KMeans(3, tol=-1).fit(x), "tol must be a number from 0"),
        (lambda x: KMeans(3).fit(x, sample_weight=np.ones(3)), "sample_weight must be 30"),
        (lambda x: KMeans(3).fit(x, sample_weight=np.zeros(30)), "every weight is zero"),
        (lambda x: BayesianGaussianMixture(covariance_type="tied").fit(x), "one of full, diag, spherical"),
        (lambda x: BayesianGaussianMixture(n_components=31).fit(x), "Expected n_samples >= n_components"),
        (lambda x: BayesianGaussianMixture(n_components=31).partial_fit(x), "n_components = 31"),
        (lambda x: BayesianGaussianMixture(degrees_of_freedom_prior=4).fit(x), "a number above 4"),
        (lambda x: BayesianGaussianMixture(mean_prior=[1, 2]).fit(x), r"of shape \(5,\), got \(2,\)"),
        (
            lambda x: BayesianGaussianMixture(weight_concentration_prior_type="dirichlet_distribution").fit(
                x
            ),
            "one of dirichlet_process",
        ),
        (
            lambda x: BayesianGaussianMixture(reg_covar=0, covariance_prior=np.zeros((5, 5))).fit(x[:2] * 0),
            "no positive variance",
        ),
        (lambda x: BayesianGaussianMixture().fit(x).sample(0), "n_samples must be a whole number"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call(rows(30))


@pytest.mark.parametrize("estimator", [NearestNeighbors(), KMeans(), BayesianGaussianMixture()])
def test_nothing_is_answered_before_fit(estimator):
    with pytest.raises(NotFittedError):
        (estimator.kneighbors if hasattr(estimator, "kneighbors") else estimator.predict)(rows(9))


def test_without_scikit_learn_it_says_so():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from dinofast.errors import InputError\n"
        "try:\n    import dinofast.drop_in.sklearn\n"
        "except InputError as error: print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install scikit-learn" in found.stdout


def test_the_example_agrees_with_scikit_learn(capsys):
    path = Path(__file__).parents[1] / "examples" / "sklearn_neighbors.py"
    if not path.is_file():
        pytest.skip("examples/ is not beside the tests")
    found = runpy.run_path(str(path))["main"](rows=500, queries=40, channels=16, repeats=1)
    assert set(found) == {"cosine", "euclidean", "k-means", "mixture"}
    assert max(found.values()) < 1e-4
    assert capsys.readouterr().out.count("largest difference") == 4
