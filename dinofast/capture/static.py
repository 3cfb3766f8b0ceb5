"""Find what a CUDA graph cannot record, before anything is recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dinofast.errors import InputError
from dinofast.ops.registry import OPS, choose

_WAITS = {
    "aten::_local_scalar_dense": "the host reads a value",
    "aten::_linalg_check_errors": "the host reads whether a factorization worked",
    "aten::_linalg_eigh": "the host takes part in an eigendecomposition",
    "aten::_linalg_svd": "the host takes part in a singular value decomposition",
    "aten::_unique2": "the size of a result depends on values",
    "aten::bincount": "the size of a result depends on values",
    "aten::equal": "the host reads a value",
    "aten::lift_fresh": "numbers come from the host",
    "aten::masked_select": "the size of a result depends on values",
    "aten::nonzero": "the size of a result depends on values",
    "aten::unique_dim": "the size of a result depends on values",
}


class StaticOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Run what is inside as ever, but refuse the first operation that waits for values from the device.

    Operators of dinofast are looked into: what counts is the kernel that they choose. What native code does
    by itself is not seen.

    Args:
        name: what the error says cannot be captured.

    Raises:
        InputError: inside, naming the operation.
    """

    def __init__(self, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._name = name
        self._inside: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Judge one operation, then run it."""
        kwargs = kwargs or {}
        name: str = func._schema.name
        if func.namespace == "dinofast":
            op = OPS[name.removeprefix("dinofast::")]
            kernel = choose(op, args)
            self._inside.append(f"{kernel.backend} kernel of {op.name}")
            with self:
                result = kernel.run(*args)
            self._inside.pop()
            return result
        if (reason := _reason(name, func, args, kwargs)) is not None:
            where = f" in the {self._inside[-1]}" if self._inside else ""
            raise InputError(
                f"{self._name} cannot be captured: {reason} ({name.removeprefix('aten::')}{where}), and a "
                "recorded graph cannot wait; call predict instead."
            )
        with self:  # inside an operator, composite ones arrive whole
            parts = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if parts is NotImplemented else parts


def _reason(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if name in _WAITS:
        return _WAITS[name]
    if name in ("aten::index", "aten::index_put_", "aten::index_put"):
        masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        return "the size of a result depends on a mask" if masks else None
    if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
        return "the size of a result depends on values"
    if name == "aten::_to_copy":
        target = kwargs.get("device")
        moved = target is not None and torch.device(target).type != args[0].device.type
        return "a tensor moves between host and device" if moved else None
    if name == "aten::copy_":
        devices = {x.device.type for x in args[:2] if isinstance(x, Tensor)}
        return "a tensor moves between host and device" if len(devices) > 1 else None
    return None
