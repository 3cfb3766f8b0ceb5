"""Arrays of other libraries, in and out without a copy."""

import sys
import warnings
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from cupy_stand_in import CupyArray, Foreign

from dinofast import interop, models, ops
from dinofast.errors import InputError
from dinofast.interop import TensorBatches, call, like, to_tensor
from dinofast.types import Features, Scores


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


class Old(np.ndarray):
    """An array of NumPy < 2.1, which exports no read-only memory."""

    def __dlpack__(self, *args, **options):
        raise BufferError("Cannot export readonly array since signalling readonly is unsupported by DLPack.")


@pytest.mark.parametrize("shape", [(2, 3), (0,), ()])
def test_read_only_memory_does_not_go_through_dlpack(shape):
    array = read_only(np.ones(shape, np.float32).view(Old))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = to_tensor(array)
    assert found.shape == shape
    assert found.data_ptr() == address(array) or not array.size
    assert bool((found == 1).all())


class Silent(Foreign):
    """What DLPack without versions hands over: NumPy takes it for read-only."""

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__()


def test_a_library_that_does_not_tell_what_is_writable_is_not_called_read_only():
    array = Silent(np.ones(3, np.float32))
    assert to_tensor(array).tolist() == [1, 1, 1]
    with pytest.raises(InputError, match=r"out: the Silent is read-only, or its DLPack .*does not tell"):
        to_tensor(array, "out", writable=True)


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


def address(array):
    return array.__array_interface__["data"][0]


class Claims:
    """An array of a GPU, by its own word."""

    def __init__(self, tensor, **more):
        data = {"data": (tensor.data_ptr(), False), "shape": tuple(tensor.shape), "typestr": "<f4"}
        self.__cuda_array_interface__ = {"version": 3, **data, **more}


class OnDevice(Foreign):
    """What DLPack says to be on a GPU."""

    def __dlpack_device__(self):
        return 2, 0


def test_dlpack_of_the_host_keeps_what_its_library_promises():
    array = read_only(np.arange(6, dtype=np.float32))
    assert to_tensor(Foreign(array)).data_ptr() == address(array)
    with pytest.raises(InputError, match="out: the Foreign is read-only"):
        to_tensor(Foreign(array), "out", writable=True)
    backwards = np.arange(6.0)[::-1]  # from which torch itself would end the process
    np.testing.assert_array_equal(to_tensor(Foreign(backwards)).numpy(), backwards)
    halves = torch.ones(3, dtype=torch.bfloat16)
    assert to_tensor(Foreign(halves)).data_ptr() == halves.data_ptr()
    with pytest.raises(InputError, match=r"rows: torch cannot take this Foreign .*byte order"):
        to_tensor(Foreign(np.arange(6, dtype=">f4")), "rows")


def test_array_interface_alone_is_shared():
    array = np.arange(6, dtype=np.float32)
    plain = SimpleNamespace(__array_interface__=array.__array_interface__, owner=array)
    assert to_tensor(plain).data_ptr() == address(array)


@pytest.mark.parametrize("array", [Claims(torch.ones(3)), OnDevice(torch.ones(3))], ids=["claims", "dlpack"])
def test_gpu_arrays_are_refused_without_a_gpu(monkeypatch, array):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        InputError, match=f"rows: this {type(array).__name__} is on a GPU, and torch .* finds none"
    ):
        to_tensor(array, "rows")
    with pytest.raises(InputError, match="is on a GPU"):
        ops.cosine_max(array, array)


def test_a_mask_is_not_lost():
    with pytest.raises(InputError, match=r"rows: a masked array would lose its mask; give its filled\(\)"):
        to_tensor(np.ma.masked_array(np.ones(3), [0, 1, 0]), "rows")


@pytest.mark.parametrize(
    "array", [np.array([1, "a"], object), np.zeros(3, "M8[s]"), np.zeros(3, [("a", "f4")])]
)
def test_dtypes_that_torch_lacks_are_named(array):
    with pytest.raises(InputError, match=r"rows: torch cannot take this ndarray of .*; convert it first"):
        to_tensor(array, "rows")


def test_work_on_cupys_arrays_is_on_cupys_stream(gpu):
    gpu.cupy, seen = 32, []

    def work(x):
        seen.append((gpu.current.cuda_stream, x.data_ptr()))
        return x + 1, x

    array = CupyArray(torch.zeros(3))
    more, given = call(work, array)
    assert seen == [(32, array.tensor.data_ptr())]
    assert gpu.log == ["32 waits for 16", "16 waits for 32"]
    assert gpu.current.cuda_stream == 16
    assert type(more) is type(given) is CupyArray
    assert given.tensor.data_ptr() == array.tensor.data_ptr()


@pytest.mark.parametrize(("cupys", "log"), [(16, []), (0, ["0 waits for 16", "16 waits for 0"])])
def test_a_shared_stream_needs_no_waiting_and_the_default_stream_is_known(gpu, cupys, log):
    gpu.cupy = cupys
    call(torch.neg, CupyArray(torch.zeros(3)))
    assert gpu.log == log


def test_an_error_leaves_torch_on_its_stream(gpu):
    gpu.cupy = 32
    with pytest.raises(ZeroDivisionError):
        call(lambda _: 1 / 0, CupyArray(torch.zeros(3)))
    assert gpu.log[-1] == "16 waits for 32"
    gpu.cupy = 2
    with pytest.raises(InputError, match="per-thread default stream"):
        call(torch.neg, CupyArray(torch.zeros(3)))


def test_a_stream_of_batches_is_read_lazily_and_once_on_its_stream(gpu):
    gpu.cupy, read = 32, []

    def batches():
        for i in range(2):
            read.append(i)
            yield Features(CupyArray(torch.full((1, 2, 2, 3), float(i))), None, (4, 4))

    with TensorBatches(batches()) as found:
        assert read == gpu.log == []
        for i, one in enumerate(found):
            assert type(one.tensor) is torch.Tensor
            assert float(one.tensor.max()) == i == read[-1]
            assert gpu.current.cuda_stream == 32
        given = found.given(Scores(torch.ones(1), torch.ones(1, 4, 4)))
    assert gpu.current.cuda_stream == 16
    assert gpu.log == ["32 waits for 16", "16 waits for 32"]
    assert type(given.score) is type(given.map) is CupyArray


def test_models_take_cupys_features(gpu):
    gpu.cupy = 32
    tensor = torch.randn(2, 4, 4, 8)
    of_cupy, of_torch = (Features(x, None, (8, 8)) for x in (CupyArray(tensor), tensor))
    bank = models.create("memory_bank").fit([of_cupy])
    found, expected = bank.score(of_cupy), bank.score(of_torch)
    assert type(found.map) is CupyArray
    assert torch.equal(found.map.tensor, expected.map)
    assert torch.equal(bank.patch_scores(of_cupy).tensor, bank.patch_scores(of_torch))


def test_memory_of_a_result_waits_for_cupys_stream(gpu):
    gpu.cupy, used = 32, []
    result = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0))
    result.detach, result.record_stream = lambda: result, lambda stream: used.append(stream.cuda_stream)
    assert like(result, CupyArray(torch.zeros(1))).tensor is result
    assert used == [32]


def test_the_writer_of_a_cuda_array_is_waited_for(gpu, monkeypatch):
    memory = torch.ones(3)
    monkeypatch.setattr(torch, "as_tensor", lambda *_, **__: memory)
    assert to_tensor(Claims(memory, stream=48)) is memory
    assert gpu.log == ["16 waits for 48"]
    to_tensor(Claims(memory, stream=None))
    assert len(gpu.log) == 1
    with pytest.raises(InputError, match="rows: the array is on another GPU than cpu"):
        to_tensor(Claims(torch.ones(4)), "rows")
    with pytest.raises(InputError, match=r"rows: torch has no negative strides, this has \(-4,\)"):
        to_tensor(Claims(memory, strides=(-4,)), "rows")
    with pytest.raises(InputError, match="rows: the array is read-only"):
        to_tensor(Claims(memory, data=(memory.data_ptr(), True)), "rows", writable=True)


def test_unknown_arrays_of_a_gpu_come_back_as_tensors():
    result = SimpleNamespace(is_cuda=True)
    result.detach = lambda: result
    assert like(result, Claims(torch.ones(3))) is result


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


@pytest.mark.needs_cuda
def test_operators_and_models_work_on_cupys_stream():
    import cupy

    draw = cupy.random.default_rng(0)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        seen, rows = [], draw.standard_normal((4, 6, 6, 16), dtype=cupy.float32)
        interop.call(lambda _: seen.append(torch.cuda.current_stream().cuda_stream), rows)
        assert seen == [stream.ptr]
        assert to_tensor(rows).data_ptr() == rows.data.ptr
        queries, bank = rows[:2].reshape(-1, 16), rows.reshape(-1, 16)
        distance, index = ops.knn_topk(queries, bank, 2)
        assert type(distance) is type(index) is cupy.ndarray
        assert index[:, 0].tolist() == list(range(72))
        np.testing.assert_array_equal(to_tensor(rows[::-1]).cpu().numpy(), rows[::-1].get())
        model = models.create("memory_bank").fit([Features(rows, None, (12, 12))])
        scores = model.score(Features(rows + 1, None, (12, 12)))
        assert type(scores.map) is cupy.ndarray
    expected = model.score(Features(torch.from_numpy(rows.get() + 1).cuda(), None, (12, 12)))
    np.testing.assert_allclose(scores.map.get(), expected.map.cpu().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.needs_cuda
def test_results_dropped_by_cupy_are_not_overwritten_while_its_stream_reads_them():
    import cupy

    with cupy.cuda.Stream(non_blocking=True) as stream:
        total = cupy.zeros((), cupy.float64)
        source = cupy.ones((1 << 22,), cupy.float32)
        for _ in range(20):
            total += like(to_tensor(source).clone(), source).sum(dtype=cupy.float64)
            torch.zeros(1 << 22, device="cuda")
        stream.synchronize()
    assert float(total) == 20 * (1 << 22)
