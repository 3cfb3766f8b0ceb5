"""The only dispatcher: operators are declared once, kernels are offered, one is chosen inside the operator.

`define` registers `torch.ops.dinofast.<name>` with its plain-torch reference, its fake (shapes) and its
gradient. `provide` offers a kernel. Each call takes the first offered kernel that serves the device of the
arguments and does not refuse them; the reference never refuses. `torch.compile` sees one node.
"""

from __future__ import annotations

import contextvars
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from dinofast.errors import InputError, KernelError

T = TypeVar("T")

BACKENDS = ("cpu", "cuda", "triton", "reference")
"""Every backend name, in the order in which offers are tried."""

OPS: dict[str, Op] = {}
"""Operator name -> operator, filled by `define`."""

MISSING: dict[str, str] = {}
"""Backend -> why it could not be loaded, filled by `providers`; shown by `dinofast info`."""

DEVICES: dict[str, Callable[[torch.device], str | None]] = {}
"""Backend -> takes a GPU; None, or why no kernel of the backend runs on it. Filled by `providers`."""

_LIBRARY: Any = cast(Any, torch.library.Library)("dinofast", "DEF")
_FORCED: contextvars.ContextVar[str | None] = contextvars.ContextVar("dinofast_backend", default=None)
_KEEPING: contextvars.ContextVar[list[object] | None] = contextvars.ContextVar("dinofast_kept", default=None)
_STATIC: contextvars.ContextVar[bool] = contextvars.ContextVar("dinofast_static", default=False)
_HELD: dict[int, object] = {}
MOST_HELD = 64
"""Tables that are held for graphs recorded outside `keeping`."""
_LOG = logging.getLogger("dinofast.ops")


@dataclass(frozen=True)
class Kernel:
    """An offer to compute an operator.

    Attributes:
        backend: one of `BACKENDS`.
        devices: torch device types it serves, such as ("cpu",).
        run: takes the operator's arguments, returns its results.
        refuse: takes the same arguments; None, or the reason in words why `run` cannot serve them.
        yields: takes the same arguments; None, or why a later kernel, other than the reference, should rather
            serve them.
    """

    backend: str
    devices: tuple[str, ...]
    run: Callable[..., Any]
    refuse: Callable[..., str | None] = lambda *_: None
    yields: Callable[..., str | None] = lambda *_: None


@dataclass(frozen=True)
class Sample:
    """One tuple of arguments on which the harness holds every kernel to the reference."""

    name: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Cost:
    """What a perfect kernel moves and computes: bytes read and written once, multiply-adds counted as two."""

    bytes: int
    flops: int


@dataclass
class Op:
    """A declared operator.

    Attributes:
        name: the one word that names it in every room.
        reference: its meaning in plain torch; float64 arguments are computed in float64.
        samples: argument tuples for the harness.
        cost: bytes and flops of a perfect kernel for given arguments.
        inputs: positions of the arguments that may be float32, bfloat16 or float16; other floating arguments
            are float32. All may be float64 together.
        verify: raises when integer results do not mean what they must; None when there are none.
        differentiable: whether a gradient formula exists; without one, inputs that require grad are refused.
        workspace: takes a device type and the arguments, whose values it does not read; most bytes that a
            kernel for this device allocates beside its results, within a tenth.
        tolerance: takes (args, index of a floating result); what a kernel may err beyond twice torch's own
            error in the same dtype: (absolute, relative). Sums over N rows state theirs here.
        kernels: offers, in the order in which they are tried.
    """

    name: str
    reference: Callable[..., Any]
    samples: Callable[[], Sequence[Sample]]
    cost: Callable[..., Cost]
    inputs: tuple[int, ...]
    verify: Callable[[tuple[Any, ...], tuple[Tensor, ...], tuple[Tensor, ...]], None] | None
    differentiable: bool
    tolerance: Callable[[tuple[Any, ...], int], tuple[float, float]]
    workspace: Callable[..., int]
    kernels: list[Kernel] = field(default_factory=list)


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    samples: Callable[[], Sequence[Sample]],
    cost: Callable[..., Cost],
    inputs: tuple[int, ...],
    verify: Callable[[tuple[Any, ...], tuple[Tensor, ...], tuple[Tensor, ...]], None] | None = None,
    differentiable: bool = False,
    tolerance: Callable[[tuple[Any, ...], int], tuple[float, float]] = lambda _args, _i: (1e-6, 0.0),
    workspace: Callable[..., int] = lambda _device, *_args: 0,
) -> Op:
    """Declare an operator.

    The gradient of a differentiable operator is that of its reference, recomputed in the backward pass, so
    the forward pass saves nothing but its inputs and may run any kernel.

    Args:
        schema: signature in torch's schema language, e.g. "f(Tensor a, int k) -> (Tensor, Tensor)".
        reference: the meaning, in plain torch.
        fake: shapes and dtypes of the results; states the contract with `torch._check`.
        samples: see `Op`.
        cost: see `Op`.
        inputs: see `Op`.
        verify: see `Op`.
        differentiable: see `Op`.
        tolerance: see `Op`.
        workspace: see `Op`.

    Returns:
        The operator, also found under its name in `OPS`.
    """
    name = schema.partition("(")[0]
    op = Op(name, reference, samples, cost, inputs, verify, differentiable, tolerance, workspace)
    op.kernels.append(Kernel("reference", ("cpu", "cuda"), reference))

    def run(*args: Any) -> Any:
        return choose(op, args).run(*args)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dinofast::{name}", fake, lib=_LIBRARY)
    if differentiable:
        torch.library.register_autograd(
            f"dinofast::{name}", _backward(op), setup_context=_save_inputs, lib=_LIBRARY
        )
    else:
        _LIBRARY.impl(name, _refuse_grad(op), "Autograd", with_keyset=True)
    OPS[name] = op
    return op


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
    outputs = output if isinstance(output, tuple) else (output,)
    ctx.mark_non_differentiable(*(x for x in outputs if not x.is_floating_point()))


def _backward(op: Op) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        args = [
            next(tensors) if tensor else other
            for tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)
        ]
        wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]
        with torch.enable_grad():
            for i in wanted:
                args[i] = args[i].detach().requires_grad_()
            results = op.reference(*args)
            results = results if isinstance(results, tuple) else (results,)
            pairs = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None and y.requires_grad]
            found = torch.autograd.grad(
                [y for y, _ in pairs], [args[i] for i in wanted], [g for _, g in pairs], allow_unused=True
            )
        out: list[Tensor | None] = [None] * len(args)
        for i, grad in zip(wanted, found, strict=True):
            out[i] = grad
        return tuple(out)

    return backward


def _refuse_grad(op: Op) -> Callable[..., Any]:
    def refuse(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise RuntimeError(
                f"{op.name}: has no gradient, and an argument requires grad; call it under torch.no_grad() "
                "or detach the argument"
            )
        call = getattr(torch.ops.dinofast, op.name).default
        with torch._C._AutoDispatchBelowAutograd():
            return call.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return refuse


def provide(name: str, kernel: Kernel) -> None:
    """Offer a kernel for operator `name`; offers are tried in the order of `BACKENDS`, the reference last.

    Raises:
        ValueError: an unknown backend name, or one that already has a kernel for this operator.
    """
    op = OPS[name]
    if kernel.backend not in BACKENDS:
        raise ValueError(f"{name}: unknown backend {kernel.backend!r}; one of {', '.join(BACKENDS)}")
    if any(offered.backend == kernel.backend for offered in op.kernels):
        raise ValueError(f"{name}: backend {kernel.backend!r} already has a kernel")
    op.kernels.append(kernel)
    op.kernels.sort(key=lambda offered: BACKENDS.index(offered.backend))


def forced_backend() -> str | None:
    """Give the backend forced by `backend(...)` or `DINOFAST_BACKEND`, or None.

    Raises:
        InputError: `DINOFAST_BACKEND` names no backend.
    """
    name = _FORCED.get() or os.environ.get("DINOFAST_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise InputError(f"DINOFAST_BACKEND={name}: no such backend; one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force every operator inside the block to use one backend; one that cannot serve a call then raises.

    Args:
        name: "cpu", "cuda", "triton" or "reference".

    Raises:
        ValueError: an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; one of {', '.join(BACKENDS)}")
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)


@contextmanager
def keeping() -> Iterator[list[object]]:
    """Collect the tables that kernels inside read from caches, for a CUDA graph that is recorded there.

    A cache lets go of tables that were not used for long; a graph reads them at every replay. So keep the
    list as long as the graph. `Detector.capture` does.

    Yields:
        The list; it grows while the block runs.

    >>> with keeping() as tables:  # and inside it `with torch.cuda.graph(graph):`
    ...     map = torch.ops.dinofast.upsample_blur(torch.ones(1, 3, 4), [31, 29], 1.5, "bilinear", "reflect")
    """
    found: list[object] = []
    token = _KEEPING.set(found)
    try:
        yield found
    finally:
        _KEEPING.reset(token)


def kept(cached: T) -> T:
    """Pass on what a cache of device memory gave; a cache may let go of it, a recorded graph may not.

    Inside `keeping`, the block's owner decides how long it lives. Elsewhere, what a graph of the caller's own
    reads is held for good, since nobody tells when that graph is gone: up to `MOST_HELD` tables, and no more.

    Raises:
        KernelError: a graph that is recorded outside `keeping` reads a table beyond those `MOST_HELD`.
    """
    found = _KEEPING.get()
    if found is not None:
        found.append(cached)
    elif _is_recording():
        if len(_HELD) >= MOST_HELD and id(cached) not in _HELD:
            raise KernelError(
                f"{MOST_HELD} tables of weights are held for CUDA graphs that were recorded outside "
                "dinofast.ops.keeping(), and another would be; record inside it, and keep the list that it "
                "gives as long as the graph."
            )
        _HELD[id(cached)] = cached
    return cached


@contextmanager
def static() -> Iterator[None]:
    """Have what is inside refuse to wait for the device, as if it were recorded in a graph."""
    token = _STATIC.set(True)
    try:
        yield
    finally:
        _STATIC.reset(token)


def is_static() -> bool:
    """Tell whether the caller may not wait: inside `static`, or while a CUDA graph is recorded."""
    return _STATIC.get() or _is_recording()


def _is_recording() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def choose(op: Op, args: tuple[Any, ...]) -> Kernel:
    """Choose the kernel for these arguments: the first that serves their device and does not refuse.

    One that yields to later ones is taken when only the reference is left.

    Raises:
        InputError: `DINOFAST_BACKEND` names no backend.
        KernelError: the forced backend cannot serve the call; the message gives every reason.
    """
    device = next(x for x in args if isinstance(x, Tensor)).device.type
    forced = forced_backend()
    reasons = []
    yielded: Kernel | None = None
    for kernel in op.kernels:
        if forced is not None and kernel.backend != forced:
            continue
        if device not in kernel.devices:
            reason: str | None = f"serves {' and '.join(kernel.devices)}, the arguments are on {device}"
        else:
            reason = kernel.refuse(*args)
        if reason is None and yielded is not None and kernel.backend == "reference":
            return yielded
        if reason is None and forced is None:
            reason = kernel.yields(*args)
            yielded = kernel if reason is not None and yielded is None else yielded
        if reason is None:
            return kernel
        reasons.append(f"{kernel.backend}: {reason}")
        if forced is None:
            _LOG.debug("%s: %s; trying the next kernel", op.name, reasons[-1])
    if not reasons:
        reasons = [f"{forced}: {MISSING.get(forced or '', 'has no kernel for this operator')}"]
    raise KernelError(f"{op.name}: no kernel can run; " + "; ".join(reasons))
