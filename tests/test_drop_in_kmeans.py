"""The k-means packages' names against Lloyd's iteration written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinofast.drop_in.fastkmeans import FastKMeans
from dinofast.drop_in.flash_kmeans import batch_kmeans_Euclid
from dinofast.errors import InputError


def blobs(seed, n=120, d=6, k=4):
    draw = np.random.default_rng(seed)
    return (4 * draw.normal(size=(k, d))[draw.integers(k, size=n)] + draw.normal(size=(n, d))).astype(
        np.float32
    )


def assigned(rows, centers):
    return ((rows[:, None].astype(np.float64) - centers) ** 2).sum(2).argmin(1)


def lloyd(rows, centers, n_iters):
    """Labels by the centers before the last move, and the centers after it."""
    centers = centers.astype(np.float64)
    for _ in range(n_iters):
        labels, old = assigned(rows, centers), centers.copy()
        for k in range(len(centers)):
            centers[k] = rows[labels == k].astype(np.float64).mean(0) if (labels == k).any() else old[k]
    return labels, centers


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("n_iters", [1, 3, 50])
def test_every_set_of_a_batch_is_clustered_by_itself(n_iters, kind):
    x = np.stack([blobs(0), blobs(1), blobs(2)])
    start = x[:, :5].copy()
    start[1, 4] = 1e3  # no row is nearest: it stays
    ids, centers, made = batch_kmeans_Euclid(kind(x), 5, n_iters, init_centroids=kind(start))
    assert made == n_iters
    assert type(ids) is type(centers) is type(kind(x))
    for i in range(3):
        labels, expected = lloyd(x[i], start[i], n_iters)
        np.testing.assert_array_equal(ids[i], labels)
        np.testing.assert_allclose(centers[i], expected, rtol=1e-5, atol=1e-5)
    assert (np.asarray(centers)[1, 4] == 1e3).all()


def test_a_tolerance_ends_before_the_move():
    x = torch.from_numpy(blobs(3))[None]
    ids, centers, made = batch_kmeans_Euclid(x, 4, tol=1e-6, seed=1)
    assert made < 100
    np.testing.assert_array_equal(ids[0], assigned(x[0].numpy(), centers[0].numpy()))
    _, first, made = batch_kmeans_Euclid(x, 4, tol=1e6, init_centroids=x[:, :4])
    assert (made, torch.equal(first, x[:, :4])) == (1, True)
    assert torch.equal(batch_kmeans_Euclid(x, 4, seed=2)[1], batch_kmeans_Euclid(x, 4, seed=2)[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: batch_kmeans_Euclid(torch.ones(3, 2), 1), r"x must be \(B, N, D\), got \(3, 2\)"),
        (lambda: batch_kmeans_Euclid(torch.ones(1, 3, 2), 0), "at least 1, got 0 and 100"),
        (lambda: batch_kmeans_Euclid(torch.ones(1, 3, 2), 2, init_centroids=torch.ones(1, 1, 2)), "must be"),
        (lambda: batch_kmeans_Euclid(torch.full((1, 3, 2), torch.nan), 2), "holds NaN"),
        (lambda: FastKMeans(2, 0), "at least 1, got 2, 0, 25 and 256"),
        (lambda: FastKMeans(2, 4).train(torch.ones(3, 2)), "wants 4 finite rows or more, got 3"),
        (lambda: FastKMeans(2, 1).train(torch.full((3, 2), torch.nan)), "or NaN"),
        (lambda: FastKMeans(2, 1).predict(torch.ones(3, 2)), "call train first"),
        (lambda: FastKMeans(3, 1).train(torch.ones(3, 2)), r"must be \(N, 3\)"),
    ],
)
def test_what_cannot_be_clustered_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_fast_kmeans_stands_still_at_the_means_of_its_clusters():
    rows = blobs(4, n=400)
    kmeans = FastKMeans(6, 4, niter=100, max_points_per_centroid=None, chunk_size_data=7)
    assert kmeans.fit(rows) is kmeans
    labels = kmeans.predict(rows)
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, assigned(rows, kmeans.centroids))
    np.testing.assert_allclose(kmeans.centroids, lloyd(rows, kmeans.centroids, 1)[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(kmeans.fit_predict(torch.from_numpy(rows)), torch.from_numpy(labels))


def test_fast_kmeans_restarts_empty_clusters_and_trains_on_a_share():
    rows = np.repeat(blobs(5, n=6), 30, axis=0)  # equal rows to start from leave clusters empty
    found = [FastKMeans(6, 6, niter=200, tol=0, seed=seed).fit(rows).centroids for seed in range(5)]
    assert all(len(np.unique(assigned(rows, c))) == 6 for c in found)
    few = FastKMeans(6, 2, niter=1, max_points_per_centroid=3, seed=1).fit(blobs(6))
    assert not np.allclose(few.centroids, FastKMeans(6, 2, niter=1, seed=1).fit(blobs(6)).centroids)
