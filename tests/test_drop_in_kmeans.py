"""The k-means packages' names against Lloyd's iteration written out in float64."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
import torch

from dinofast import drop_in
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
        (lambda: FastKMeans(2, 0), "at least 1, got 2, 0, 25 and 1000000000"),
        (lambda: FastKMeans(2, 4).train(torch.ones(3, 2)), "wants 4 finite rows or more, got 3"),
        (lambda: FastKMeans(2, 1).train(torch.full((3, 2), torch.nan)), "or NaN"),
        (lambda: FastKMeans(2, 1).predict(torch.ones(3, 2)), "call train first"),
        (lambda: FastKMeans(3, 1).train(torch.ones(3, 2)), r"must be \(N, 3\)"),
        (lambda: FastKMeans(2, 1, nredo=9), "nredo must be 1, got 9"),
        (lambda: FastKMeans(2, 1).train([[1, 2], [3]]), "data: no array of numbers"),
        (lambda: FastKMeans(2, 1).train(torch.ones(3, 2) * 1j), "data must be real numbers"),
        (lambda: FastKMeans(2, 1).train(np.full((3, 2), 1e300)), "or NaN or infinity"),
        (lambda: batch_kmeans_Euclid(torch.ones(1, 3, 2), 1, backend="nonsense"), "triton, cute, torch, got"),
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


@pytest.mark.parametrize("more", [{"spherical": True}, {"init_centroids": None}, {"typo": 1}])
def test_fast_kmeans_has_no_other_arguments_than_its_host(more):
    with pytest.raises(TypeError, match=next(iter(more))):
        FastKMeans(2, 1, **more)
    with pytest.raises(TypeError):
        FastKMeans(2, 1).train(np.ones((3, 2), np.float32), None)


def test_fast_kmeans_takes_its_hosts_positions_and_trains_in_place():
    options = (7, 8, "cpu", torch.float16, False, True, 1, False)
    kmeans = FastKMeans(6, 4, 5, 0.0, False, 3, None, *options)
    assert (kmeans.max_points_per_centroid, kmeans.chunk_size_data, kmeans.use_triton) == (None, 7, False)
    assert kmeans.train(blobs(7)) is None
    assert kmeans.fit(blobs(7)) is kmeans
    np.testing.assert_array_equal(kmeans.centroids, FastKMeans(6, 4, 5, 0.0, seed=3).fit(blobs(7)).centroids)


KINDS = {
    "float64": lambda rows: rows.astype(np.float64),
    "integers": lambda rows: rows.astype(np.int16),
    "tensor": lambda rows: torch.from_numpy(rows).double(),
    "lists": lambda rows: rows.tolist(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_any_kind_are_clustered_as_float32(kind):
    rows = blobs(8).round()
    given = KINDS[kind](rows)
    kmeans, expected = FastKMeans(6, 4).fit(given), FastKMeans(6, 4).fit(rows)
    np.testing.assert_array_equal(kmeans.centroids, expected.centroids)
    np.testing.assert_array_equal(kmeans.predict(given), expected.predict(rows))
    given = given[None] if hasattr(given, "shape") else [given]
    lists = kind == "lists"
    start = None if lists else given[:, :4]
    ids, centers, made = batch_kmeans_Euclid(given, 4, 9, init_centroids=start)
    start = None if lists else rows[None, :4]
    wanted = batch_kmeans_Euclid(rows[None], 4, 9, init_centroids=start)
    np.testing.assert_array_equal(ids, wanted[0])
    np.testing.assert_array_equal(centers, wanted[1])
    assert made == wanted[2]
    assert str(centers.dtype).endswith("64" if kind in ("float64", "tensor") else "32")


@pytest.mark.parametrize(
    ("host", "name", "stands_in"),
    [("fastkmeans", "FastKMeans", FastKMeans), ("flash_kmeans", "batch_kmeans_Euclid", batch_kmeans_Euclid)],
)
def test_a_host_is_patched_for_a_block(host, name, stands_in):
    before = sys.modules.get(host)
    with drop_in.patch(host):
        assert getattr(importlib.import_module(host), name) is stands_in
        with pytest.raises(ImportError):
            importlib.import_module(f"{host}.contrib")
    assert sys.modules.get(host) is before
