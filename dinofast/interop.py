"""Arrays of other libraries in and out without a copy: NumPy, torch, CuPy and whatever speaks DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinofast.errors import InputError


def to_tensor(array: Any, name: str = "array", *, writable: bool = False) -> Tensor:
    """View an array as a tensor that shares its memory, on its device.

    Work on a GPU array is ordered behind what its library has queued on the caller's current stream.

    Args:
        array: torch tensor, NumPy array, or anything with `__dlpack__` or `__cuda_array_interface__`.
        name: what errors call it.
        writable: whether the tensor is to be written to.

    Returns:
        The tensor. With `writable`, writing to it writes to `array`. Without, it must not be written to: its
        memory may be read-only, and NumPy arrays of negative strides or the other byte order are copied.

    Raises:
        InputError: no such array, or of a dtype or layout that torch does not have; with `writable`, an array
            that is read-only or could only be copied.

    >>> to_tensor(np.ones((2, 3), np.float32)).shape
    torch.Size([2, 3])
    """
    if isinstance(array, Tensor):
        return array
    try:
        if isinstance(array, np.ndarray):
            return _from_numpy(array, name, writable)
        if hasattr(array, "__dlpack__"):
            return torch.from_dlpack(array)  # type: ignore[attr-defined]
        if hasattr(array, "__cuda_array_interface__"):
            return _from_cuda(array, name, writable)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        kind = f"{type(array).__name__} of {getattr(array, 'dtype', 'unknown dtype')}"
        raise InputError(f"{name}: torch cannot take this {kind} ({error}); convert it first") from error
    raise InputError(
        f"{name}: expected a NumPy, torch or CuPy array, or one with __dlpack__, got {type(array).__name__}"
    )


def like(result: Tensor, array: Any) -> Any:
    """Give a result as the kind of array that came in, sharing memory: CuPy for CuPy, NumPy for NumPy.

    Args:
        result: tensor, on the device of `array`.
        array: what `to_tensor` took.

    Returns:
        A torch tensor for a torch tensor; CuPy for CuPy; else NumPy, from another device by a copy.
    """
    if isinstance(array, Tensor):
        return result
    if type(array).__module__.split(".")[0] == "cupy":
        import cupy

        return cupy.from_dlpack(result.detach())
    return result.detach().cpu().numpy()


def _from_numpy(array: np.ndarray[Any, Any], name: str, writable: bool) -> Tensor:
    if writable and not array.flags.writeable:
        raise InputError(f"{name}: the array is read-only and cannot be written to; give a copy")
    if array.dtype.byteorder not in "=|" or any(stride < 0 for stride in array.strides):
        if writable:
            raise InputError(
                f"{name}: torch cannot write to {array.dtype.str} with strides {array.strides}; "
                "give an array of native byte order and positive strides"
            )
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))  # torch has neither of these
    # from_numpy warns of read-only memory, which is only read here
    return torch.from_numpy(array) if array.flags.writeable else torch.from_dlpack(array)  # type: ignore[attr-defined]


def _from_cuda(array: Any, name: str, writable: bool) -> Tensor:
    tensor = torch.as_tensor(array, device="cuda")
    address, read_only = array.__cuda_array_interface__["data"]
    if writable and (read_only or tensor.data_ptr() != address):
        raise InputError(f"{name}: the array is read-only or on another device; give one on {tensor.device}")
    return tensor
