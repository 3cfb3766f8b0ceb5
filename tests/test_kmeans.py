"""K-means against Lloyd's iterations written out in NumPy float64."""

import numpy as np
import pytest
import torch

from dinofast.errors import InputError
from dinofast.models.kmeans import kmeans


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def plus_plus(rows, k, generator):
    """The draws of the generator, in its order: a row, then one uniform number for each further center."""
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    while len(chosen) < k:
        gap = ((rows[:, None] - rows[None, chosen]) ** 2).sum(2).min(1)
        gap = gap if gap.any() else np.ones(len(rows))
        drawn = torch.rand(1, generator=generator, dtype=torch.float64).item() * gap.sum()
        chosen.append(int((gap.cumsum() <= drawn).sum()))
    return rows[chosen]


def lloyd(rows, centers, n_iter=50, tol=1e-6, cosine=False):
    step, done = np.inf, 0
    while done < n_iter and step > tol:
        owner = ((rows[:, None] - centers[None]) ** 2).sum(2).argmin(1)
        moved = centers.copy()
        for i in set(owner.tolist()):
            mean = rows[owner == i].mean(0)
            moved[i] = unit(mean) if cosine else mean
        step = np.linalg.norm(moved - centers, axis=1).max()
        centers, done = moved, done + 1
    gap = ((rows[:, None] - centers[None]) ** 2).sum(2)
    return centers, gap.argmin(1), gap.min(1), done


def clustered(n, d=10, seed=0, k=5):
    rng = np.random.default_rng(seed)
    return (3 * rng.normal(size=(k, d))[rng.integers(k, size=n)] + rng.normal(size=(n, d))).astype(np.float32)


@pytest.mark.parametrize("k", [1, 2, 5, 17])
@pytest.mark.parametrize("init", ["k-means++", "random-rows"])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_equals_the_definition(k, init, distance):
    for seed in range(3):
        rows = clustered(200, seed=seed)
        wide = unit(rows.astype(float)) if distance == "cosine" else rows.astype(float)
        generator = torch.Generator().manual_seed(seed)
        if init == "k-means++":
            start = plus_plus(wide, k, generator)
        else:
            start = wide[torch.randperm(200, generator=generator)[:k].tolist()]
        centers, owner, gap, done = lloyd(wide, start, cosine=distance == "cosine")
        found = kmeans(torch.from_numpy(rows), k, init=init, distance=distance, seed=seed)
        np.testing.assert_allclose(found.centers, centers, atol=1e-5)
        np.testing.assert_allclose(found.sq_distance, gap, rtol=1e-4, atol=1e-5)
        assert found.index.tolist() == owner.tolist()
        assert abs(found.n_iter - done) <= 1  # a step near tol


@pytest.mark.parametrize(("n_iter", "tol"), [(1, 1e-6), (3, 1e-6), (50, 0.5), (50, 1e9)])
def test_iterations_and_tolerance_end_it(n_iter, tol):
    rows = clustered(300)
    start = plus_plus(rows.astype(float), 8, torch.Generator().manual_seed(0))
    centers, _, _, done = lloyd(rows.astype(float), start, n_iter, tol)
    found = kmeans(torch.from_numpy(rows), 8, n_iter=n_iter, tol=tol)
    assert found.n_iter == done < 50
    np.testing.assert_allclose(found.centers, centers, atol=1e-5)


def test_the_best_of_several_starts_is_kept():
    rows = torch.from_numpy(clustered(120, k=12))
    generator = torch.Generator().manual_seed(4)
    wide = rows.double().numpy()
    runs = [lloyd(wide, plus_plus(wide, 12, generator)) for _ in range(6)]
    inertia = [run[2].sum() for run in runs]
    assert len({round(value, 3) for value in inertia}) > 1
    assert np.argmin(inertia) > 0
    found = kmeans(rows, 12, n_init=6, seed=4)
    np.testing.assert_allclose(found.centers, runs[int(np.argmin(inertia))][0], atol=1e-5)


def test_a_center_without_rows_keeps_its_place():
    """Four starts on three distinct rows: two centers are equal, the later one gets no rows."""
    rows = torch.tensor([[0.0, 0], [0, 0], [0, 1], [5, 0]])[torch.arange(20) % 4]
    for seed in range(5):
        found = kmeans(rows, 4, seed=seed)
        start = plus_plus(rows.double().numpy(), 4, torch.Generator().manual_seed(seed))
        assert found.centers.tolist() == start.tolist()
        assert {tuple(c) for c in found.centers.tolist()} == {(0, 0), (0, 1), (5, 0)}
        assert len(set(found.index.tolist())) == 3
        assert not found.sq_distance.any()


def test_as_many_clusters_as_rows_give_the_rows():
    rows = torch.randn(4, 3)
    for k in (4, 9):
        found = kmeans(rows, k)
        assert torch.equal(found.centers, rows)
        assert found.index.tolist() == [0, 1, 2, 3]
        assert found.n_iter == 0
    assert torch.equal(kmeans(torch.ones(3, 2), 5).centers, torch.ones(3, 2))


def test_seed_decides_and_half_precision_is_served():
    rows = torch.from_numpy(clustered(90, k=9))
    assert torch.equal(kmeans(rows, 9, seed=3).centers, kmeans(rows, 9, seed=3).centers)
    assert len({kmeans(rows, 9, seed=seed).index.tolist()[0] for seed in range(9)}) > 1
    half = rows.to(torch.bfloat16)
    assert torch.equal(kmeans(half, 9).centers, kmeans(half.float(), 9).centers)
    assert kmeans(rows.double(), 9).centers.dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kmeans(torch.ones(3, 2).index_fill(0, torch.tensor(1), torch.nan), 2), "row 1 holds NaN"),
        (lambda: kmeans(torch.ones(3, 2).index_fill(0, torch.tensor(2), torch.inf), 9), "row 2 holds NaN or"),
        (lambda: kmeans(torch.ones(0, 2), 2), "rows must be a floating-point matrix"),
        (lambda: kmeans(torch.ones(3, 2).int(), 2), "rows must be a floating-point matrix"),
        (lambda: kmeans(torch.ones(3), 2), "rows must be a floating-point matrix"),
        (lambda: kmeans(torch.ones(3, 2), 0), "n_clusters must be a whole number, at least 1, got 0"),
        (lambda: kmeans(torch.ones(3, 2), 2, n_init=0), "n_init must be a whole number"),
        (lambda: kmeans(torch.ones(3, 2), 2, n_iter=0), "n_iter must be a whole number"),
        (lambda: kmeans(torch.ones(3, 2), 2, init="first"), r"unknown init 'first'; one of k-means\+\+"),
        (lambda: kmeans(torch.ones(3, 2), 2, distance="l1"), "unknown distance 'l1'; one of euclidean"),
        (lambda: kmeans(torch.ones(3, 2), 2, tol=torch.nan), "tol must be finite and at least 0, got nan"),
        (lambda: kmeans(torch.ones(3, 2), 2, tol=torch.inf), "tol must be finite and at least 0, got inf"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message):
        call()
