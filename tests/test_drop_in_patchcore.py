"""The names of patchcore-inspection, on what its code does with them."""

import numpy as np
import pytest
import torch

from dinofast.drop_in import patchcore
from dinofast.errors import InputError
from dinofast.models.coreset import k_center


def rows(n, d=12, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def nearest(queries, bank, k):
    distance = ((queries[:, None].astype(np.float64) - bank[None]) ** 2).sum(2)
    order = distance.argsort(1)[:, :k]
    return np.take_along_axis(distance, order, 1), order


def test_scorer_gives_mean_squared_distances_of_joined_layers(tmp_path):
    layers, queries = [rows(40).reshape(40, 3, 4), rows(40, 5, 1)], [rows(6, 12, 2), rows(6, 5, 3)]
    scorer = patchcore.NearestNeighbourScorer(3, patchcore.FaissNN(False, 2))
    scorer.fit(layers)
    scores, distances, numbers = scorer.predict(queries)
    bank, asked = np.hstack([layers[0].reshape(40, 12), layers[1]]), np.hstack(queries)
    expected, order = nearest(asked, bank, 3)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)
    np.testing.assert_array_equal(numbers, order)
    np.testing.assert_allclose(scores, expected.mean(1), rtol=1e-5)
    scorer.save(tmp_path, prepend="1_")
    again = patchcore.NearestNeighbourScorer(3)
    again.load(tmp_path, "1_")
    np.testing.assert_array_equal(again.predict(queries)[0], scores)
    with pytest.raises(InputError, match="reconstruct_n"):
        scorer.save(tmp_path, save_features_separately=True)


def test_the_host_reads_the_index_and_we_read_the_hosts(tmp_path):
    faiss = pytest.importorskip("faiss")
    method = patchcore.FaissNN()
    method.fit(rows(9))
    method.save(tmp_path / "a")
    np.testing.assert_array_equal(faiss.read_index(str(tmp_path / "a")).reconstruct_n(0, 9), rows(9))
    index = faiss.IndexFlatL2(12)
    index.add(rows(9))
    faiss.write_index(index, str(tmp_path / "b"))
    method.load(tmp_path / "b")
    assert method.run(1, rows(9))[1].ravel().tolist() == list(range(9))


def test_method_searches_other_rows_for_one_call_and_forgets():
    method = patchcore.FaissNN()
    with pytest.raises(InputError, match="call fit first"):
        method.run(1, rows(2))
    method.fit(rows(9))
    distance, number = method.run(1, rows(2, seed=5), rows(7, seed=6))
    np.testing.assert_array_equal(number, nearest(rows(2, seed=5), rows(7, seed=6), 1)[1])
    assert distance.shape == (2, 1)
    assert method.run(1, rows(9))[1].ravel().tolist() == list(range(9))
    method.reset_index()
    with pytest.raises(InputError, match="no rows to save"):
        method.save("nowhere")


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_samplers_keep_rows_of_the_kind_that_came_in(kind):
    features = kind(rows(50))
    assert patchcore.IdentitySampler().run(features) is features
    whole = {tuple(row) for row in rows(50).tolist()}
    for sampler in (
        patchcore.RandomSampler(0.2, seed=1),
        patchcore.GreedyCoresetSampler(0.2, seed=1),
        patchcore.ApproximateGreedyCoresetSampler(0.2, "cpu", seed=1),
    ):
        found = sampler.run(features)
        assert type(found) is type(features)
        kept = {tuple(row) for row in found.tolist()}
        assert len(kept) == 10
        assert kept <= whole
        assert (np.asarray(sampler.run(features)) == np.asarray(found)).all()


def test_greedy_samplers_are_the_published_coresets():
    features = torch.from_numpy(rows(60))
    for sampler, start in (
        (patchcore.GreedyCoresetSampler, "distance-norm"),
        (patchcore.ApproximateGreedyCoresetSampler, "mean-of-10"),
    ):
        for channels, projection in ((128, "linear-128"), (None, None), (12, None)):
            found = sampler(0.25, dimension_to_project_features_to=channels, seed=3).run(features)
            chosen = k_center(features, 15, start=start, projection=projection, seed=3)
            assert torch.equal(found, features[chosen])


def test_without_a_seed_torchs_generator_decides():
    features, found = rows(50), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(patchcore.RandomSampler(0.3).run(features))
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patchcore.RandomSampler(1.0), "percentage must be between 0 and 1"),
        (
            lambda: patchcore.GreedyCoresetSampler(0.1, "cpu", 64).run(rows(9)),
            "must be 128, D or None, got 64",
        ),
        (lambda: patchcore.GreedyCoresetSampler(0.01).run(rows(9)), "selects none"),
        (lambda: patchcore.ApproximateGreedyCoresetSampler(0.1, "cpu", 5), "must be 10, got 5"),
        (lambda: patchcore.NearestNeighbourScorer(1).fit([]), "one array a layer"),
        (
            lambda: patchcore.NearestNeighbourScorer(1).fit([rows(9), rows(8)]),
            r"same rows in every layer, at least 1, got \[\(9, 12\), \(8, 12\)\]",
        ),
        (lambda: patchcore.NearestNeighbourScorer(1).fit([rows(0)]), r"at least 1, got \[\(0, 12\)\]"),
        (lambda: patchcore.NearestNeighbourScorer(1).fit([np.ones(())]), r"got \[\(\)\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
