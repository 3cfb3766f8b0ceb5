"""Arrays of other libraries, in and out without a copy."""

import sys
import warnings
from types import ModuleType

import numpy as np
import pytest
import torch

from dinofast.errors import InputError
from dinofast.interop import like, to_tensor


class Foreign:
    """What any other library may hand over: it speaks DLPack and nothing else."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


def test_numpy_torch_and_dlpack_share_their_memory():
    tensor, array = torch.arange(6.0).view(2, 3), np.arange(6, dtype=np.float32).reshape(2, 3)
    assert to_tensor(tensor) is tensor
    for source, storage in ((array, array), (Foreign(tensor), tensor)):
        found = to_tensor(source)
        found[1, 2] = 77
        assert storage[1, 2] == 77
    assert to_tensor(array[:, ::2]).shape == (2, 2)


def test_read_only_numpy_is_shared_without_a_warning():
    array = np.arange(6, dtype=np.float32)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_tensor(array).data_ptr() == array.__array_interface__["data"][0]


@pytest.mark.parametrize(
    "array", [np.arange(6.0)[::-1], np.arange(6, dtype=">f4")], ids=["reversed", "swapped"]
)
def test_layouts_that_torch_lacks_are_copied(array):
    np.testing.assert_array_equal(to_tensor(array).numpy(), array)


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (read_only(np.zeros(3, np.float32)), "out: the array is read-only"),
        (np.arange(6.0)[::-1], r"out: torch cannot write to <f8 with strides \(-8,\)"),
        (np.arange(6, dtype=">f4"), "out: torch cannot write to >f4"),
    ],
    ids=["read-only", "reversed", "swapped"],
)
def test_what_cannot_be_written_to_is_named(array, message):
    before = array.copy()
    with pytest.raises(InputError, match=message):
        to_tensor(array, "out", writable=True)
    np.testing.assert_array_equal(array, before)


def test_a_writable_view_writes_to_the_array():
    array = np.zeros((4, 6), np.float32)
    to_tensor(array[::2, 1:3], writable=True).fill_(1)
    assert array.sum() == 4


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ([[1.0]], "queries: expected a NumPy, torch or CuPy array, .*got list"),
        (np.array(["a"]), "queries: torch cannot take this ndarray of <U1"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_array_is_named(array, message):
    with pytest.raises(InputError, match=message):
        to_tensor(array, "queries")


def test_results_come_back_as_what_went_in(monkeypatch):
    result = torch.ones(3)
    assert like(result, torch.zeros(1)) is result
    found = like(result, np.zeros(1))
    assert isinstance(found, np.ndarray)
    found[0] = 5
    assert result[0] == 5
    cupy = ModuleType("cupy")
    cupy.from_dlpack = lambda tensor: ("cupy", tensor)
    cupy.ndarray = type("ndarray", (), {"__module__": "cupy"})
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    kind, tensor = like(result, cupy.ndarray())
    assert kind == "cupy"
    assert tensor.data_ptr() == result.data_ptr()


@pytest.mark.needs_cuda
def test_cupy_goes_in_and_out_on_its_own_stream():
    import cupy

    with cupy.cuda.Stream() as stream:
        array = cupy.arange(6, dtype=cupy.float32)
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            tensor = to_tensor(array)
            tensor += 1
            back = like(tensor * 2, array)
    assert isinstance(back, cupy.ndarray)
    assert back.tolist() == [2, 4, 6, 8, 10, 12]
    assert array.tolist() == [1, 2, 3, 4, 5, 6]
