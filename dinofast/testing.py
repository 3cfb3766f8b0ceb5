"""What "the same result" means: shared by the tests, the benchmarks and users who bring their own kernels.

The truth is the reference in float64. A kernel may err twice what plain torch errs in the same dtype, plus
the operator's stated tolerance; NaN and infinities must stand in the same places, so a broken patch never
looks normal; integer results are held to what they mean, by the operator's own `verify`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinofast.ops.registry import Kernel, Op


def assert_kernel(op: Op, kernel: Kernel, args: tuple[Any, ...]) -> None:
    """Run a kernel and hold its results to the float64 reference of the same arguments.

    Args:
        op: the operator.
        kernel: an offer for it that serves and does not refuse `args`.
        args: the operator's arguments.

    Raises:
        AssertionError: names the result, the error found and the error allowed.
    """
    truth = as_tuple(op.reference(*cast_inputs(op, args, torch.float64)))
    yardstick = as_tuple(op.reference(*args))
    assert_results(op, args, as_tuple(kernel.run(*args)), truth, yardstick)


def assert_results(
    op: Op,
    args: tuple[Any, ...],
    results: Sequence[Tensor],
    truth: Sequence[Tensor],
    yardstick: Sequence[Tensor],
) -> None:
    """Hold results to the truth, allowing twice the error of the yardstick plus the operator's tolerance.

    Args:
        op: the operator.
        args: the arguments that gave the results.
        results: what is judged.
        truth: the same in float64.
        yardstick: plain torch's results in the dtype of the arguments.

    Raises:
        AssertionError: shape or dtype differ, NaN or inf stand elsewhere, the error is too large, or an
            integer result does not mean what it must.
    """
    assert len(results) == len(truth), f"{op.name}: {len(results)} results, expected {len(truth)}"
    for i, (got, true, torch_own) in enumerate(zip(results, truth, yardstick, strict=True)):
        label = f"{op.name}: result {i}"
        assert got.shape == true.shape, f"{label} has shape {tuple(got.shape)}, expected {tuple(true.shape)}"
        assert got.dtype == torch_own.dtype, f"{label} is {got.dtype}, expected {torch_own.dtype}"
        if not got.is_floating_point():
            continue
        got, torch_own = got.double(), torch_own.double()
        same = (got == true) | (got.isnan() & true.isnan())
        open_cases = ~same & true.isfinite()
        wrong_places = ~same & ~open_cases | (open_cases & ~got.isfinite())
        assert not bool(wrong_places.any()), (
            f"{label}: NaN or inf differ at {wrong_places.nonzero()[:5].tolist()}"
        )
        if not bool(open_cases.any()):
            continue
        own = (torch_own - true)[true.isfinite()].abs().nan_to_num(0).max()
        absolute, relative = op.tolerance(args, i)
        allowed = 2 * own + absolute + relative * true.abs()
        excess = ((got - true).abs() - allowed)[open_cases]
        worst = (got - true).abs()[open_cases].max().item()
        assert excess.max().item() <= 0, f"{label} errs by {worst:.3g}; torch errs by {own.item():.3g}"
    if op.verify is not None:
        op.verify(args, tuple(results), tuple(truth))


def cast_inputs(op: Op, args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Convert the floating arguments that may have `dtype`: all for float64, else the operator's inputs."""
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and x.is_floating_point() and (dtype == torch.float64 or i in op.inputs)
        else x
        for i, x in enumerate(args)
    )


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    """Give an operator's results as a tuple, one result included."""
    return results if isinstance(results, tuple) else (results,)
