"""anomalib's names where anomalib is not installed; tests/hosts holds them against the real one."""

import importlib.util

import numpy as np
import pytest
import torch

from dinofast.drop_in import anomalib as ours
from dinofast.errors import InputError


def rows(n, d=12, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.skipif(importlib.util.find_spec("anomalib") is not None, reason="anomalib is installed")
def test_without_anomalib_patching_says_so():
    with pytest.raises(InputError, match=r"No module named 'anomalib'.*wants anomalib 2\.7"), ours.patched():
        pass


def test_neighbors_are_euclidean_and_flat_for_one():
    bank, queries = rows(40), rows(9, seed=1)
    distance = torch.cdist(queries.double(), bank.double())
    near, index = ours.nearest_neighbors(queries, bank, 1)
    assert near.shape == index.shape == (9,)
    torch.testing.assert_close(near.double(), distance.amin(1), rtol=1e-5, atol=1e-5)
    near, index = ours.nearest_neighbors(queries, ours.Bank(bank, "euclidean"), 3)
    torch.testing.assert_close(near.double(), distance.sort(1).values[:, :3], rtol=1e-5, atol=1e-5)
    assert torch.equal(index, distance.argsort(1)[:, :3])


def test_coreset_follows_torchs_generator():
    picked = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        picked.append(ours.KCenterGreedy(rows(60), 0.2).select_coreset_idxs())
    assert picked[0] == picked[1] != picked[2]
    assert len(set(picked[0])) == 12
    torch.manual_seed(1)
    assert torch.equal(ours.KCenterGreedy(rows(60), 0.2).sample_coreset(), rows(60)[picked[0]])
    with pytest.raises(ValueError, match=r"selects none; give at least 0\.017"):
        ours.KCenterGreedy(rows(60), 0.01)


def test_map_is_nearest_and_mirrored_gaussian():
    ndimage = pytest.importorskip("scipy.ndimage")
    scores = rows(2, 6).abs().view(2, 1, 2, 3)
    found = ours.AnomalyMapGenerator(sigma=2)(scores, (20, 30))
    for b in range(2):
        pixels = np.kron(scores[b, 0].numpy(), np.ones((10, 10)))
        expected = ndimage.gaussian_filter(pixels, 2, mode="mirror", truncate=4)
        np.testing.assert_allclose(found[b, 0], expected, atol=1e-5)
    assert ours.AnomalyMapGenerator(0)(scores).shape == scores.shape


def test_anomaly_dino_search_is_mean_cosine_distance():
    unit = torch.nn.functional.normalize
    bank, queries = unit(rows(40)), unit(rows(9, seed=1))
    distance = (1 - queries @ bank.T).clamp(0, 2)
    torch.testing.assert_close(ours.AnomalyDINOSearch(bank)(queries), distance.amin(1), atol=1e-5, rtol=1e-5)
    three = distance.sort(1).values[:, :3].mean(1)
    torch.testing.assert_close(ours.AnomalyDINOSearch(bank, 3)(queries), three, atol=1e-5, rtol=1e-5)
    scores = ours.AnomalyDINOSearch.mean_top1p(torch.arange(400.0).view(2, 200))
    assert scores.tolist() == [[198.5], [398.5]]
