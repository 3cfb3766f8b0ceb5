"""The faiss names against the real faiss-cpu, where it is installed, and against what it is known to do."""

import struct
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinofast import drop_in
from dinofast.drop_in import faiss as ours
from dinofast.drop_in import flat_search
from dinofast.errors import InputError
from dinofast.ops.bank import FEW

METRICS = ["IndexFlatL2", "IndexFlatIP"]
FAR = np.float32(np.finfo(np.float32).max)


@pytest.fixture(scope="module")
def faiss():
    return pytest.importorskip("faiss")


def rows(n, d=5, seed=0, levels=0):
    """Random rows; with levels, on a coarse grid, where distances tie and zero rows occur."""
    draw = np.random.default_rng(seed)
    if levels:
        return draw.integers(-levels, levels + 1, (n, d)).astype(np.float32)
    return draw.standard_normal((n, d)).astype(np.float32)


def same(found, expected, bank, queries, metric):
    """Equal distances; each number reaches the distance beside it, so ties may come in any order."""
    (distance, number), (D_faiss, I_faiss) = found, expected
    assert distance.dtype == np.float32
    assert number.dtype == np.int64
    np.testing.assert_allclose(distance, D_faiss, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(number == -1, I_faiss == -1)
    for q in range(len(number)):
        named = number[q][number[q] >= 0]
        assert len(set(named)) == len(named)
        pairs = bank[named].astype(np.float64)
        reached = ((pairs - queries[q]) ** 2).sum(1) if "L2" in metric else pairs @ queries[q]
        np.testing.assert_allclose(distance[q][: len(named)], reached, rtol=1e-5, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    metric=st.sampled_from(METRICS),
    m=st.integers(0, 60),
    q=st.integers(0, 9),
    d=st.integers(1, 9),
    k=st.integers(1, 70),
    levels=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_search_is_that_of_faiss(faiss, metric, m, q, d, k, levels, seed):
    bank, queries = rows(m, d, seed, levels), rows(q, d, seed + 1, levels)
    theirs, mine = getattr(faiss, metric)(d), getattr(ours, metric)(d)
    for index in (theirs, mine):
        index.add(bank[: m // 2])
        index.add(bank[m // 2 :])
    assert mine.ntotal == theirs.ntotal == m
    same(mine.search(queries, k), theirs.search(queries, k), bank, queries, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_bank_is_prepared_when_searched_enough_and_searches_as_faiss(faiss, monkeypatch, metric):
    built = []
    real = flat_search.Bank
    monkeypatch.setattr(flat_search, "Bank", lambda *args: built.append(len(args[0])) or real(*args))
    bank, queries = rows(FEW + 10, 24), rows(FEW // 4 + 10, 24, 1)
    theirs, mine = getattr(faiss, metric)(24), getattr(ours, metric)(24)
    theirs.add(bank)
    mine.add(bank)
    for times in (0, 1, 1):
        same(mine.search(queries, 5), theirs.search(queries, 5), bank, queries, metric)
        assert built == times * [FEW + 10]


@pytest.mark.parametrize("metric", METRICS)
def test_range_search_removal_and_reconstruction(faiss, metric):
    bank, queries = rows(50, levels=1), rows(7, seed=1, levels=1)
    theirs, mine = getattr(faiss, metric)(5), getattr(ours, metric)(5)
    for index in (theirs, mine):
        index.add(bank)
        assert index.remove_ids(np.array([3, 3, 7, 49, 99])) == 3
    np.testing.assert_array_equal(mine.reconstruct_n(0, 47), theirs.reconstruct_n(0, 47))
    np.testing.assert_array_equal(mine.reconstruct(4), theirs.reconstruct(4))
    lims, distance, number = mine.range_search(queries, 3.0)
    their_lims, their_D, their_I = theirs.range_search(queries, 3.0)
    np.testing.assert_array_equal(lims, their_lims)
    for i in range(7):
        part = slice(int(lims[i]), int(lims[i + 1]))
        order = np.argsort(their_I[part])
        np.testing.assert_array_equal(number[part], their_I[part][order])
        np.testing.assert_allclose(distance[part], their_D[part][order], rtol=1e-5)


@pytest.mark.parametrize("block", [7, 1 << 22])
@pytest.mark.parametrize("threshold", [0, 1, 2, 3, 5, 18, 25, 49])
def test_rows_at_the_limit_are_left_out(faiss, monkeypatch, threshold, block):
    monkeypatch.setattr(ours, "BLOCK", block)
    monkeypatch.setattr(flat_search, "BLOCK", block)
    bank, queries = rows(60, 3, levels=3), rows(9, 3, 1, levels=3)
    bank[:3], queries[0] = [(1, 1, 0), (1, 2, 0), (3, 3, 0)], 0
    theirs, mine = faiss.IndexFlatL2(3), ours.IndexFlatL2(3)
    theirs.add(bank)
    mine.add(bank)
    (lims, distance, number), expected = (i.range_search(queries, threshold) for i in (mine, theirs))
    np.testing.assert_array_equal(lims, expected[0])
    for i in range(len(queries)):
        part = slice(int(lims[i]), int(lims[i + 1]))
        order = np.argsort(expected[2][part])
        np.testing.assert_array_equal(number[part], expected[2][part][order])
        np.testing.assert_array_equal(distance[part], expected[1][part][order])


def test_nan_queries_find_nothing_and_nan_rows_are_not_found(faiss):
    bank, queries = rows(9), rows(3, seed=1)
    bank[4, 2], queries[1, 0] = np.nan, np.inf
    theirs, mine = faiss.IndexFlatL2(5), ours.IndexFlatL2(5)
    theirs.add(bank)
    mine.add(bank)
    (distance, number), (their_D, their_I) = mine.search(queries, 9), theirs.search(queries, 9)
    np.testing.assert_array_equal(number[[0, 2]], their_I[[0, 2]])
    np.testing.assert_allclose(distance[[0, 2]], their_D[[0, 2]], rtol=1e-5)
    assert (number[1] == -1).all()
    assert (distance[1] == FAR).all()
    assert 4 not in number


def test_ties_come_in_order_of_number():
    index = ours.IndexFlatIP(2)
    index.add(np.array([[0, 1], [1, 0], [0, 1], [1, 0]], np.float32))
    assert index.search(np.array([[1, 0]], np.float32), 4)[1].tolist() == [[1, 3, 0, 2]]


def test_id_map_gives_own_numbers_back(faiss):
    bank, ids = rows(6), np.array([10, 20, 30, 40, 50, 60])
    found = []
    for module in (faiss, ours):
        index = module.IndexIDMap(module.IndexFlatL2(5))
        index.add_with_ids(bank, ids)
        assert index.remove_ids(np.array([20, 99])) == 1
        found.append(index.search(bank, 7))
        index.reset()
        assert index.ntotal == 0
    np.testing.assert_array_equal(found[1][1], found[0][1])
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="use add_with_ids"):
        ours.IndexIDMap(ours.IndexFlatL2(5)).add(bank)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("mapped", [False, True])
def test_files_are_those_of_faiss_both_ways(faiss, tmp_path, metric, mapped):
    bank = rows(6)
    for writer, reader in ((faiss, ours), (ours, faiss)):
        index = getattr(writer, metric)(5)
        if mapped:
            index = writer.IndexIDMap(index)
            index.add_with_ids(bank, np.arange(6) * 7)
        else:
            index.add(bank)
        writer.write_index(index, str(tmp_path / writer.__name__))
        found = reader.read_index(str(tmp_path / writer.__name__))
        np.testing.assert_array_equal(found.search(bank, 3)[1], index.search(bank, 3)[1])
    assert (tmp_path / "faiss").read_bytes() == (tmp_path / ours.__name__).read_bytes()


def test_broken_files_are_named(faiss, tmp_path):
    index = faiss.IndexFlatL2(5)
    index.add(rows(6))
    faiss.write_index(index, str(tmp_path / "whole"))
    whole = (tmp_path / "whole").read_bytes()
    faiss.write_index(faiss.index_factory(4, "SQ8"), str(tmp_path / "other"))
    negative = bytearray(whole)
    struct.pack_into("<iq", negative, 4, -5, -6)
    cases = {
        "negative": bytes(negative),
        "torn": whole[:-3],
        "empty": b"",
        "long": whole + b"x",
        "other": None,
        "absent": None,
    }
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: "):
            ours.read_index(tmp_path / name)


def test_normalize_l2_works_in_place_and_leaves_zero_rows(faiss):
    array = rows(5)
    array[2] = 0
    expected, tensor = array.copy(), torch.from_numpy(array.copy())
    faiss.normalize_L2(expected)
    ours.normalize_L2(array)
    ours.normalize_L2(tensor)
    np.testing.assert_allclose(array, expected, rtol=1e-6)
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-6)
    with pytest.raises(InputError, match="float32 matrix"):
        ours.normalize_L2(np.zeros((2, 2)))


def unwritable(tmp_path):
    """Float32 matrices (3, 2) of ones that torch would crash on, overwrite, or leave unchanged."""
    np.save(tmp_path / "a.npy", np.ones((3, 2), np.float32))
    yield np.load(tmp_path / "a.npy", mmap_mode="r")
    frozen = np.ones((3, 2), np.float32)
    frozen.flags.writeable = False
    yield frozen
    yield np.ones((3, 2), np.float32)[::-1]
    yield np.ones((3, 2), ">f4")


def test_nothing_is_written_to_what_cannot_be(tmp_path):
    index = ours.IndexFlatL2(5)
    index.add(rows(9))
    for array in unwritable(tmp_path):
        for call in (
            lambda given=array: ours.normalize_L2(given),
            lambda given=array: index.search(rows(3), 2, D=given),
        ):
            with pytest.raises(InputError, match=r"read-only|cannot write"):
                call()
            assert (array == 1).all()
    distance, number = np.ones((3, 2), np.float32), np.ones((3, 2), np.int64)[::-1]
    with pytest.raises(InputError, match="I: torch cannot write"):
        index.search(rows(3), 2, D=distance, I=number)
    assert (distance == 1).all()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ({"D": np.zeros((9, 3, 2), np.float32)}, r"D must be torch.float32 \(3, 2\), got .* \(9, 3, 2\)"),
        ({"D": np.zeros((3, 2))}, "D must be torch.float32 .*, got torch.float64"),
        ({"I": np.zeros((3, 3), np.int64)}, r"I must be torch.int64 \(3, 2\)"),
        ({"I": np.zeros((3, 2), np.int32)}, "got torch.int32"),
    ],
)
def test_outputs_of_another_shape_or_dtype_are_named(out, message):
    index = ours.IndexFlatL2(5)
    index.add(rows(9))
    with pytest.raises(InputError, match=message):
        index.search(rows(3), 2, **out)


def test_rows_are_brought_to_the_host_and_then_to_the_queries():
    index = ours.IndexFlatL2(5)
    nowhere = torch.empty(3, 5, device="meta")
    with pytest.raises(NotImplementedError):  # no data to copy: the index would have kept the device
        index.add(nowhere)
    index.add(rows(9))
    with pytest.raises(NotImplementedError):
        index.remove_ids(torch.zeros(2, dtype=torch.int64, device="meta"))
    with pytest.raises(NotImplementedError):
        ours.IndexIDMap(ours.IndexFlatL2(5)).add_with_ids(rows(2), torch.zeros(2, device="meta").long())
    assert index.ntotal == 9


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_ids_may_be_lists_arrays_or_tensors(kind):
    index = ours.IndexIDMap(ours.IndexFlatL2(5))
    index.add_with_ids(rows(4), kind([10, 20, 30, 40]))
    assert index.remove_ids(kind([20, 30])) == 2
    assert index.id_map.tolist() == [10, 40]
    assert index.index.remove_ids(kind([0])) == 1
    with pytest.raises(InputError, match="ids: "):
        index.remove_ids([[1], [2, 3]])


def test_knn_outputs_and_tensors(faiss):
    bank, queries = rows(9), rows(3, seed=1)
    for metric in (faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT):
        found, expected = ours.knn(queries, bank, 2, metric), faiss.knn(queries, bank, 2, metric)
        np.testing.assert_array_equal(found[1], expected[1])
    index = ours.GpuIndexFlatL2(ours.StandardGpuResources(), 5)
    index.add(torch.from_numpy(bank))
    distance, number = index.search(torch.from_numpy(queries), 2)
    assert isinstance(distance, torch.Tensor)
    own = np.zeros((3, 2), np.float32), np.zeros((3, 2), np.int64)
    given = index.search(queries, 2, D=own[0], I=own[1])
    assert given[0] is own[0]
    np.testing.assert_array_equal(own[1], number.numpy())


def test_added_rows_are_the_indexs_own():
    bank = rows(3)
    index = ours.IndexFlatL2(5)
    index.add(bank)
    bank[:] = 0
    assert index.reconstruct(0).any()


def test_kmeans_from_the_same_start_is_that_of_faiss(faiss):
    data = rows(400, 6) + 4 * rows(4, 6, 3)[np.arange(400) % 4]
    start = data[:4].copy()
    theirs, mine = (module.Kmeans(6, 4, niter=6, seed=1) for module in (faiss, ours))
    expected, found = theirs.train(data, init_centroids=start), mine.train(data, init_centroids=start)
    assert found == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(mine.obj, theirs.obj, rtol=1e-4)
    np.testing.assert_allclose(mine.centroids, theirs.centroids, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(mine.assign(data)[1], theirs.assign(data)[1])


def test_kmeans_splits_empty_clusters_and_takes_the_best_run():
    data = np.repeat(rows(3, 4), 5, axis=0) + 0.01 * rows(15, 4, 1)
    start = np.concatenate([data[:3], np.full((1, 4), 1e4, np.float32)])
    kmeans = ours.Kmeans(4, 4, niter=10)
    kmeans.train(data, init_centroids=start)
    assert np.abs(kmeans.centroids).max() < 100
    runs = [ours.Kmeans(4, 4, niter=3, seed=1234 + i) for i in range(5)]
    best = min(k.train(data) for k in runs)
    assert ours.Kmeans(4, 4, niter=3, nredo=5).train(data) == best
    unit = ours.Kmeans(4, 2, spherical=True)
    unit.train(data)
    np.testing.assert_allclose(np.linalg.norm(unit.centroids, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ours.IndexFlatL2(0), "d must be"),
        (lambda: ours.IndexFlatL2(3).add(rows(2, 4)), r"x must be a matrix \(N, 3\), got \(2, 4\)"),
        (lambda: ours.IndexFlatL2(3).search(rows(2, 3), 0), "k must be"),
        (lambda: ours.IndexFlatL2(3).search(rows(2, 3)[0], 1), "must be a matrix"),
        (lambda: ours.IndexFlatL2(3).search(rows(2, 3), 1, params=object()), "parameters are not offered"),
        (lambda: ours.IndexFlatL2(3).reconstruct(0), "an index with 0 rows"),
        (lambda: ours.Kmeans(3, 4).train(rows(2, 3)), "N >= 4"),
        (lambda: ours.Kmeans(3, 1).train(rows(2, 3) * np.nan), "NaN"),
        (lambda: ours.Kmeans(3, 1).train(rows(2, 3), weights=[1, 1]), "weighted"),
        (lambda: ours.Kmeans(3, 1).assign(rows(2, 3)), "call train first"),
        (lambda: ours.Kmeans(3, 0), "must be at least 1"),
        (lambda: drop_in.patch("faizz").__enter__(), "cannot patch 'faizz'; one of faiss"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_patch_makes_import_faiss_ours_and_brings_the_real_one_back(monkeypatch):
    real = object()
    monkeypatch.setitem(sys.modules, "faiss", real)
    with drop_in.patch("faiss") as module:
        import faiss
        import faiss.contrib.torch_utils

        assert faiss is module is ours
        with pytest.raises(RuntimeError), drop_in.patch("faiss"):
            raise RuntimeError
        assert sys.modules["faiss"] is ours
    assert sys.modules["faiss"] is real
    assert "faiss.contrib" not in sys.modules


def test_unmodified_anomalydino_search_runs_on_ours():
    """What AnomalyDINO's scripts do with faiss, on tokens of one image against a small bank."""
    script = """
import faiss
features_ref, features = (x.copy() for x in (bank, queries))
faiss.normalize_L2(features_ref)
knn_index = faiss.IndexFlatL2(features_ref.shape[1])
knn_index.add(features_ref)
faiss.normalize_L2(features)
distances, match = knn_index.search(features, k=1)
result = distances.mean(axis=1) / 2
"""
    names = {"bank": rows(50), "queries": rows(8, seed=1)}
    with drop_in.patch("faiss"):
        exec(script, names)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (names["queries"], names["bank"])]
    np.testing.assert_allclose(names["result"], 1 - (unit[0] @ unit[1].T).max(1), atol=1e-6)
