"""Operators on arrays of other libraries: the same numbers, as the kind that came in."""

import numpy as np
import pytest
import torch

from dinofast import ops
from dinofast.errors import InputError

DRAW = np.random.default_rng(0)
CALLS = {
    "cosine_map": (DRAW.random((2, 4, 5, 8)), DRAW.random((3, 8)), (16, 20)),
    "cosine_max": (DRAW.random((9, 8)), DRAW.random((3, 8))),
    "dpm_stats": (DRAW.random((9, 8)), DRAW.random((3, 8)), np.ones((3, 8)), np.log(np.ones(3) / 3)),
    "farthest_point": (DRAW.random((9, 8)), np.full(9, np.inf), np.array(2)),
    "kmeans_step": (DRAW.random((9, 8)), DRAW.random((3, 8))),
    "knn_topk": (DRAW.random((9, 8)), DRAW.random((5, 8)), 2),
    "upsample_blur": (DRAW.random((2, 4, 5)), (16, 20), 2.0),
}


def tensors(args):
    return [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in args]


def float32(args):
    return [x.astype(np.float32) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x for x in args]


def listed(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", CALLS)
def test_numpy_in_numpy_out(name):
    assert {*CALLS, "knn_topk_bank"} == set(ops.OPS)
    call, args = getattr(ops, name), float32(CALLS[name])
    found, expected = listed(call(*args)), listed(call(*tensors(args)))
    assert len(found) == len(expected)
    for array, tensor in zip(found, expected, strict=True):
        assert type(array) is np.ndarray
        assert type(tensor) is torch.Tensor
        np.testing.assert_array_equal(array, tensor.numpy())


@pytest.mark.parametrize("name", CALLS)
def test_compiles_as_one_graph(name):
    call, args = getattr(ops, name), tensors(float32(CALLS[name]))
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for found, expected in zip(listed(compiled(*args)), listed(call(*args)), strict=True):
        assert torch.equal(found, expected)


def test_the_first_array_decides_the_kind():
    queries, rows = np.eye(3, 8, dtype=np.float32), torch.eye(3, 8)
    assert type(ops.knn_topk(queries, rows)[0]) is np.ndarray
    assert type(ops.knn_topk(rows, queries)[0]) is torch.Tensor
    distance, index = ops.knn_topk(queries=queries, bank=ops.Bank(rows), k=np.int64(2))
    assert distance.shape == (3, 2)
    assert type(distance) is type(index) is np.ndarray
    assert index[:, 0].tolist() == [0, 1, 2]


def test_gradients_of_tensors_stay_and_other_things_are_refused():
    features = torch.eye(3, 8).requires_grad_()
    ops.cosine_max(features, torch.ones(2, 8))[0].sum().backward()
    assert features.grad is not None
    with pytest.raises(InputError, match="torch cannot take this ndarray of <U1"):
        ops.cosine_max(np.array([["a"]]), torch.ones(2, 8))
    with pytest.raises(RuntimeError):
        ops.cosine_max([[1.0]], [[1.0]])


def test_names_and_documentation_are_the_operators():
    for name in CALLS:
        assert getattr(ops, name).__name__ == name
        assert getattr(ops, name).__doc__
