"""The names of AnomalyDINO's scripts against OpenCV, SciPy, faiss and plain NumPy."""

import numpy as np
import pytest
import torch

from dinofast.drop_in import anomalydino
from dinofast.errors import InputError
from dinofast.models import memory_bank


def rows(n, d=12, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("metric", anomalydino.METRICS)
def test_search_is_that_of_the_scripts(metric, k):
    faiss = pytest.importorskip("faiss")
    bank, queries = rows(70), rows(20, seed=1)
    expected_bank, expected_queries = bank.copy(), queries.copy()
    if metric == "L2_normalized":
        faiss.normalize_L2(expected_bank)
        faiss.normalize_L2(expected_queries)
    index = faiss.IndexFlatL2(12)
    index.add(expected_bank)
    squared = index.search(expected_queries, k)[0].mean(1)
    expected = squared / 2 if metric == "L2_normalized" else np.sqrt(squared)
    search = anomalydino.Search(bank, metric, k)
    np.testing.assert_allclose(search(queries), expected, rtol=1e-5, atol=1e-6)
    found = search(torch.from_numpy(queries))
    assert isinstance(found, torch.Tensor)
    np.testing.assert_array_equal(found.numpy(), search(queries))
    np.testing.assert_array_equal(queries, rows(20, seed=1))


@pytest.mark.parametrize(("n", "top"), [(1024, 10), (250, 2), (99, 1), (1, 1)])
def test_image_score_is_the_mean_of_the_largest_percent(n, top):
    distances = np.random.default_rng(n).random(n)
    assert anomalydino.mean_top1p(distances) == pytest.approx(np.sort(distances)[-top:].mean())
    assert anomalydino.mean_top1p(torch.from_numpy(distances)) == anomalydino.mean_top1p(distances)


def test_image_score_of_whole_numbers_is_a_mean():
    assert anomalydino.mean_top1p(np.arange(200)) == 198.5
    assert anomalydino.mean_top1p(torch.arange(200)) == 198.5


@pytest.mark.parametrize("shape", [(448, 448, 3), (100, 230)])
def test_map_is_that_of_opencv_and_scipy(shape):
    cv2, ndimage = pytest.importorskip("cv2"), pytest.importorskip("scipy.ndimage")
    grid = np.random.default_rng(0).random((32, 20)).astype(np.float32)
    resized = cv2.resize(grid, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)
    expected = ndimage.gaussian_filter(resized, sigma=4)
    np.testing.assert_allclose(anomalydino.dists2map(grid, shape), expected, atol=2e-5)


@pytest.mark.parametrize("quantile", [0.001, 0.02])
def test_sets_without_references_score_as_published(quantile):
    images = [rows(400, seed=s) for s in range(7)]
    found = anomalydino.calculate_cosine_distances(images, 2, quantile=quantile)
    others = np.concatenate([unit(x.astype(float)) for i, x in enumerate(images) if i != 2])
    distance = np.sort(1 - unit(images[2].astype(float)) @ others.T, axis=1)
    rank = int(quantile * 2400)
    np.testing.assert_allclose(found, distance[:, : rank - 1].mean(1), rtol=1e-4, atol=1e-6)


def test_a_set_is_searched_image_by_image_without_a_copy_of_it(monkeypatch):
    images = [5 * rows(300, seed=s) for s in range(6)]
    searched, real = [], memory_bank.knn_topk

    def spy(queries, part, *rest):
        searched.append(part.data_ptr())
        return real(queries, part, *rest)

    monkeypatch.setattr(memory_bank, "knn_topk", spy)
    anomalydino.calculate_cosine_distances(images, 2, quantile=0.01)
    assert searched == [x.__array_interface__["data"][0] for i, x in enumerate(images) if i != 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: anomalydino.Search(rows(3), "cosine"), "knn_metric 'cosine': one of L2_normalized, L2"),
        (lambda: anomalydino.Search(rows(3), k_neighbors=4), r"in \[1, 3\], got 4"),
        (lambda: anomalydino.Search(rows(3) * np.nan), "row 0 holds NaN"),
        (lambda: anomalydino.Search(rows(3))(rows(2, 11)), r"features must be a matrix \(N, 12\)"),
        (lambda: anomalydino.mean_top1p(np.zeros(0)), "no patches"),
        (lambda: anomalydino.dists2map(np.zeros(4), (8, 8)), "dists must be"),
        (lambda: anomalydino.calculate_cosine_distances([rows(9)], 0), "there must be others"),
        (lambda: anomalydino.calculate_cosine_distances([rows(9)] * 2, 0), "of 9 patches is none"),
        (lambda: anomalydino.calculate_cosine_distances([rows(9), rows(9, 11)], 0), r"matrix \(N, 12\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
