"""Arrays of other libraries in and out without a copy: NumPy, torch, CuPy and whatever speaks DLPack.

Kinds: what comes out is of the kind that came in: torch for torch, CuPy for CuPy, NumPy for NumPy. For an
array of another library it is NumPy on the host and torch on a GPU, which such libraries take in turn.

Streams: operators and models work on CuPy's current stream of the device when they are given a CuPy array,
and on torch's for any other. Nothing waits on the host. What an array's library has queued is waited for on
the device: `__dlpack__(stream=...)` is told the stream that will read, the legacy default stream by the
number 1, and has it wait for the writer; `__cuda_array_interface__` names the writing stream, which is waited
for here. CuPy's stream and torch's current one wait for each other before and after, so each sees what the
other did. Memory of a result goes back to torch when CuPy's stream is done with it.

References:
    Array API standard 2024.12, `array.__dlpack__`; CUDA Array Interface, version 3.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from dinofast.errors import InputError
from dinofast.types import Features, Scores

if TYPE_CHECKING:
    from typing_extensions import Self

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=Callable[..., Any])
_PROTOCOLS = ("__dlpack__", "__cuda_array_interface__")
_ON_CPU, _ON_CUDA = 1, (2, 13)
"""Device types of DLPack; 13 is memory that the driver moves."""


def is_array(value: Any) -> bool:
    """Say whether operators and models take a value for an array; NumPy's scalars are none."""
    return isinstance(value, Tensor | np.ndarray) or any(hasattr(value, name) for name in _PROTOCOLS)


def to_tensor(array: Any, name: str = "array", *, writable: bool = False) -> Tensor:
    """View an array as a tensor that shares its memory, on its device.

    Work on a GPU array is ordered behind what its library has queued, see above.

    Args:
        array: torch tensor, NumPy array, or anything with `__dlpack__`, `__cuda_array_interface__` or
            `__array_interface__`.
        name: what errors call it.
        writable: whether the tensor is to be written to.

    Returns:
        The tensor, of the array's dtype. With `writable`, writing to it writes to `array`. Without, it must
        not be written to: its memory may be read-only; and what torch has not, negative strides and the other
        byte order, is copied.

    Raises:
        InputError: no such array, or of a dtype or layout that torch does not have; a masked array, whose
            mask would be lost; a CUDA array where torch finds no GPU, or of another GPU than the current one
            and without DLPack; with `writable`, an array that is read-only or could only be copied.

    >>> to_tensor(np.ones((2, 3), np.float32)).shape
    torch.Size([2, 3])
    """
    if isinstance(array, Tensor):
        return array
    try:
        if isinstance(array, np.ndarray):
            return _from_numpy(array, name, writable)
        if hasattr(array, "__dlpack__"):
            return _from_dlpack(array, name, writable)
        if hasattr(array, "__cuda_array_interface__"):
            return _from_cuda(array, name, writable)
        if hasattr(array, "__array_interface__"):
            return _from_numpy(np.asarray(array), name, writable)
    except InputError:
        raise
    except (AttributeError, TypeError, ValueError, RuntimeError, BufferError) as error:
        kind = f"{type(array).__name__} of {getattr(array, 'dtype', 'unknown dtype')}"
        raise InputError(f"{name}: torch cannot take this {kind} ({error}); convert it first") from error
    raise InputError(
        f"{name}: expected a NumPy, torch or CuPy array, or one with __dlpack__, got {type(array).__name__}"
    )


def like(result: Tensor, array: Any) -> Any:
    """Give a result as the kind of array that came in, sharing memory.

    A CuPy result is ready on CuPy's current stream.

    Args:
        result: tensor, on the device of `array`.
        array: what `to_tensor` took.

    Returns:
        See the kinds above; NumPy of a result on a GPU is a copy, for which the host waits.
    """
    if isinstance(array, Tensor):
        return result
    result = result.detach()
    if _is_cupy(array):
        import cupy

        if result.is_cuda:
            result.record_stream(_cupy_stream(result.device.index))
        return cupy.from_dlpack(result)
    foreign = is_array(array) and not isinstance(array, np.ndarray)
    return result if foreign and result.is_cuda else result.cpu().numpy()


def call(function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
    """Call a function of tensors with arrays of any library.

    Args:
        function: takes tensors, `Features` and other values; gives a tensor, a tuple of tensors, `Scores`, or
            something else.
        args: any array in place of a tensor, also in `Features`.
        kwargs: as `args`.

    Returns:
        What the function gives, tensors as the kind of the first array.

    Raises:
        InputError: see `to_tensor`.

    >>> call(torch.neg, np.ones(2))
    array([-1., -1.])
    """
    first = next((x for x in map(_array_of, (*args, *kwargs.values())) if x is not None), None)
    with on_stream_of(first):
        found = function(*map(_taken, args), **{name: _taken(value) for name, value in kwargs.items()})
        return cast(R, _given(found, first))


def takes_features(method: Callable[P, R]) -> Callable[P, R]:
    """Let a method take `Features` of any library's arrays, see `call`; anything else goes in as it is."""

    @functools.wraps(method)
    def taking(*args: P.args, **kwargs: P.kwargs) -> R:
        if not any(isinstance(value, Features) for value in (*args, *kwargs.values())):
            return method(*args, **kwargs)
        return call(method, *args, **kwargs)

    return taking


def on_callers_stream(target: C) -> C:
    """Run a function, or every public method of a class, on the stream of the arrays that it is given.

    The stream is that of the first array among the arguments, see above, those inside lists, tuples and
    mappings included; `call` does so for functions of tensors. The arguments go in as they are.
    """
    if inspect.isclass(target):
        for name, method in list(vars(target).items()):
            if inspect.isfunction(method) and (name in ("__init__", "__call__") or name[:1] != "_"):
                setattr(target, name, on_callers_stream(method))
        return cast(C, target)

    @functools.wraps(target)
    def running(*args: Any, **kwargs: Any) -> Any:
        with on_stream_of(next(_arrays_in((*args, *kwargs.values())), None)):
            return target(*args, **kwargs)

    return cast(C, running)


class TensorBatches:
    """A stream of features as tensors, and from the first batch on work on the stream of its arrays.

    Args:
        features: batches of tensors or other arrays, read once, in order.

    Raises:
        InputError: one batch instead of many, or nothing that can be read; while reading, see `to_tensor`.
    """

    def __init__(self, features: Iterable[Features]) -> None:
        if isinstance(features, Features):
            raise InputError("expected an iterable of Features, got one batch; pass [features].")
        if not any(hasattr(features, name) for name in ("__iter__", "__getitem__")):
            raise InputError(
                f"expected an iterable of Features, got {type(features).__name__}; pass a list of them."
            )
        self._features, self._first, self._stack = features, cast(Any, None), ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[Features]:
        for batch in self._features:
            if self._first is None:
                self._first = _array_of(batch)
                self._stack.enter_context(on_stream_of(self._first))
            yield _taken(batch) if isinstance(batch, Features) else batch

    def given(self, scores: Scores) -> Scores:
        """Give scores as the kind of array that the first batch was."""
        return cast(Scores, _given(scores, self._first))


@contextmanager
def on_stream_of(array: Any) -> Iterator[None]:
    """Run a block on the stream on which an array's library works, see above; only CuPy's is known."""
    stream = _cupy_stream(array.device.id) if _is_cupy(array) else None
    before = None if stream is None else torch.cuda.current_stream(stream.device)
    if stream is None or before is None or stream.cuda_stream == before.cuda_stream:
        yield
        return
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)


def _is_cupy(array: Any) -> bool:
    return type(array).__module__.partition(".")[0] == "cupy"


def _cupy_stream(device: int) -> torch.cuda.Stream:
    """Give CuPy's current stream of a device as torch's."""
    import cupy

    return _torch_stream(cupy.cuda.get_current_stream(device).ptr, device)


def _torch_stream(address: int, device: int) -> torch.cuda.Stream:
    """Give a stream by its address, or by its number in the protocols.

    Raises:
        InputError: it is the default stream of a thread, for which torch exports no array.
    """
    if address == 2:
        raise InputError(
            "torch cannot share arrays on CUDA's per-thread default stream; work on a stream of your own, "
            "such as `with cupy.cuda.Stream():`"
        )
    if address in (0, 1):
        return torch.cuda.default_stream(device)
    return torch.cuda.ExternalStream(address, device)  # type: ignore[no-untyped-call]


def _arrays_in(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        inside = value.values() if isinstance(value, Mapping) else value
        yield from filter(is_array, inside if isinstance(value, list | tuple | Mapping) else [value])


def _array_of(value: Any) -> Any:
    if isinstance(value, Features):
        return value.tensor
    return value if is_array(value) else None


def _taken(value: Any) -> Any:
    if not isinstance(value, Features):
        return to_tensor(value) if is_array(value) else value
    found = {name: getattr(value, name) for name in ("tensor", "cls", "intensity", "masks")}
    given = {n: to_tensor(x, f"features.{n}") for n, x in found.items() if not isinstance(x, Tensor | None)}
    return replace(value, **cast(dict[str, Any], given)) if given else value


def _given(found: Any, first: Any) -> Any:
    if first is None or isinstance(first, Tensor):
        return found
    if isinstance(found, Scores):
        return Scores(like(found.score, first), like(found.map, first))
    if isinstance(found, tuple):
        return tuple(like(x, first) for x in found)
    return like(found, first) if isinstance(found, Tensor) else found


def _from_numpy(array: np.ndarray[Any, Any], name: str, writable: bool) -> Tensor:
    if hasattr(array, "mask"):
        raise InputError(
            f"{name}: a masked array would lose its mask; give its filled() or compressed() rows"
        )
    if writable and not array.flags.writeable:
        raise InputError(f"{name}: the array is read-only and cannot be written to; give a copy")
    if array.dtype.byteorder not in "=|" or any(stride < 0 for stride in array.strides):
        if writable:
            raise InputError(
                f"{name}: torch cannot write to {array.dtype.str} with strides {array.strides}; "
                "give an array of native byte order and positive strides"
            )
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))  # torch has neither of these
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():  # it is only read here, and NumPy < 2.1 exports none by DLPack
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(array)


def _from_dlpack(array: Any, name: str, writable: bool) -> Tensor:
    kind = array.__dlpack_device__()[0]
    if kind == _ON_CPU:
        try:  # NumPy tells what is read-only, and reverses what torch ends the process at
            view = np.from_dlpack(array)
        except (RuntimeError, BufferError):  # a dtype that NumPy has not, such as bfloat16
            return torch.from_dlpack(array)  # type: ignore[attr-defined]
        if writable and not view.flags.writeable:
            raise InputError(
                f"{name}: the {type(array).__name__} is read-only, or its DLPack or NumPy {np.__version__} "
                "does not tell that it is not; give a torch tensor or a NumPy array"
            )
        return _from_numpy(view, name, writable)
    if kind in _ON_CUDA:
        _check_gpu(array, name)
        if any(stride < 0 for stride in getattr(array, "strides", None) or ()):
            if writable or not _is_cupy(array):
                raise InputError(
                    f"{name}: torch has no negative strides, this has {array.strides}; give a copy"
                )
            array = array.copy()
    return torch.from_dlpack(array)  # type: ignore[attr-defined]


def _from_cuda(array: Any, name: str, writable: bool) -> Tensor:
    _check_gpu(array, name)
    told = array.__cuda_array_interface__
    address, read_only = told["data"]
    if any(stride < 0 for stride in told.get("strides") or ()):
        raise InputError(f"{name}: torch has no negative strides, this has {told['strides']}; give a copy")
    if writable and read_only:
        raise InputError(f"{name}: the array is read-only and cannot be written to; give a copy")
    tensor = torch.as_tensor(array, device="cuda")
    if tensor.numel() and tensor.data_ptr() != address:
        raise InputError(
            f"{name}: the array is on another GPU than {tensor.device}; make its own the current one"
        )
    if told.get("stream") is not None:
        torch.cuda.current_stream().wait_stream(_torch_stream(told["stream"], tensor.device.index))
    return tensor


def _check_gpu(array: Any, name: str) -> None:
    if not torch.cuda.is_available():
        raise InputError(
            f"{name}: this {type(array).__name__} is on a GPU, and torch {torch.__version__} finds none; "
            "give a copy on the host, or install a torch and a driver that fit the GPU"
        )
