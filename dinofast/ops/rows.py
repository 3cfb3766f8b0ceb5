"""What several operators say in the same words: checks of row matrices, normalization, tie order, samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dinofast.ops.registry import Sample

BLOCK = 1 << 22
"""Elements of the largest temporary matrix that a reference holds (16 MiB of float32)."""


def result_dtype(x: Tensor) -> torch.dtype:
    """Give the dtype of a reduction over `x`: float32, or float64 when `x` is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


require: Callable[[bool, Callable[[], str]], None] = cast(Any, torch)._check
"""Raise RuntimeError with the message unless the condition holds; `torch.compile` learns the condition."""


def row_blocks(x: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Split (N, ...) into views of at most `rows` rows."""
    return cast("tuple[Tensor, ...]", cast(Any, x).split(max(1, rows)))


def check_rows(op: str, *, may_be_empty: bool = False, **matrices: Tensor) -> None:
    """State that all arguments are floating matrices of one dtype, device and D, and that the last has rows.

    Raises:
        RuntimeError: with the operator, what was wrong and the values.
    """
    first, *others = matrices.values()
    shape, last = first.shape, (others or [first])[-1]
    if (  # the checks below, in a tenth of the time; not for traced sizes, which `require` must see
        type(first) is Tensor
        and len(shape) == 2
        and shape[1] > 0
        and (may_be_empty or last.shape[0] > 0)
        and first.is_floating_point()
        and all(
            type(x) is Tensor
            and x.dtype == first.dtype
            and x.dim() == 2
            and x.shape[1] == shape[1]
            and x.device == first.device
            for x in others
        )
    ):
        return
    named = list(matrices.items())
    for name, x in named:
        _check_matrix(op, named[0][0], named[0][1], name, x)
    require(named[0][1].shape[1] > 0, lambda: f"{op}: D is 0")
    require(may_be_empty or named[-1][1].shape[0] > 0, lambda: f"{op}: {named[-1][0]} has no rows")


def _check_matrix(op: str, first_name: str, first: Tensor, name: str, x: Tensor) -> None:
    require(x.dim() == 2, lambda: f"{op}: {name} must be a matrix, got {x.dim()} dimensions")
    require(x.is_floating_point(), lambda: f"{op}: {name} must be floating point, got {x.dtype}")
    for what, ours, theirs in (
        ("dtype", first.dtype, x.dtype),
        ("device", first.device, x.device),
        ("D", first.shape[1], x.shape[1]),
    ):
        if ours != theirs:
            raise RuntimeError(f"{op}: {what} differs, {first_name} {ours} and {name} {theirs}")


def normalize_rows(x: Tensor) -> Tensor:
    """Scale every row to unit L2 norm, in float32 or wider.

    Dividing by the largest magnitude first keeps the squares in range, so rows of norm 1e-40 or 1e30 keep
    their direction. A zero row stays zero; a row with NaN or inf becomes NaN where it matters: any dot
    product with it is NaN.

    Args:
        x: (N, D).

    Returns:
        (N, D).
    """
    x = x.to(result_dtype(x))
    peak = x.abs().amax(dim=-1, keepdim=True)
    scaled = x / torch.where(peak == 0, 1, peak)
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / torch.where(norm == 0, 1, norm)


def accurate_unit_rows(x: Tensor) -> Tensor:
    """Scale every row to unit L2 norm by a norm in float64, so that kernels take the rows as they are.

    Args:
        x: (N, D); zero rows and rows with NaN or inf as for `normalize_rows`.

    Returns:
        (N, D), float32; each norm within 2e-7 of 1, or 0.
    """
    out = x.new_empty(x.shape, dtype=torch.float32)
    step = max(1, (1 << 17) // max(1, x.shape[1]))  # 1 MiB in float64: larger ones would stay in the C heap
    for start in range(0, x.shape[0], step):
        out[start : start + step] = normalize_rows(x[start : start + step].double())
    return out


def row_samples(*counts: tuple[int, int], dims: Sequence[int] = (1, 7, 33, 130, 384)) -> list[Sample]:
    """Make pairs of row matrices for the harness: odd sizes, ties, zero, NaN and huge rows, a strided view.

    Args:
        counts: extra (rows of the first, rows of the second) to draw at D = 33.
        dims: channels D of the plain samples.

    Returns:
        Samples whose `args` are (first (N, D), second (K, D)), float32 on the CPU.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(n: int, d: int) -> Tensor:
        return torch.randn(n, d, generator=generator)

    sizes = [(0, 3), (1, 1), (5, 2), (33, 7), (130, 33), *counts]
    found = [Sample(f"{n}x{k}x33", (draw(n, 33), draw(k, 33))) for n, k in sizes]
    found += [Sample(f"65x37x{d}", (draw(65, d), draw(37, d))) for d in dims]
    rows, others = draw(40, 33), draw(70, 33)
    ties = others.clone()
    ties[::7] = ties[3]
    found.append(Sample("ties", (rows, ties)))
    zero, zero_others = rows.clone(), others.clone()
    zero[5], zero_others[11] = 0, 0
    found.append(Sample("zero row", (zero, zero_others)))
    broken = rows.clone()
    broken[7, 3], broken[9, 32], broken[39, 0] = math.nan, math.inf, -math.inf
    found.append(Sample("NaN and inf rows", (broken, others)))
    scales = 10.0 ** torch.linspace(-40, 37, 40)
    found.append(Sample("tiny and huge rows", (rows * scales[:, None], others)))
    near = torch.full((512, 33), 1e-8)
    near[:, 0] = 1
    alike = near[:17].clone()
    near[1::2, 5] *= 1.0000002
    found.append(Sample("rows all but equal", (near, alike)))
    found.append(Sample("strided", (draw(66, 40)[::2, 7:], draw(140, 40)[::2, 7:])))
    found.append(Sample("transposed", (draw(33, 41).T, draw(33, 70).T)))
    return found


def search_workspace(device: str, n: int, k: int, d: int) -> int:
    """Give the most bytes that a search for the best of k columns for n rows of D channels allocates.

    On a CPU a block of at most 2 Mi floats of packed columns, at unit length and as codes, and tiles of
    rows a thread. On a GPU a best so far for each row and part, 65536 of them or as many as rows, and two
    factors a row.
    """
    if device == "cpu":
        block = min(k + 31, max(32, (1 << 21) // d))
        return 9 * block * d + 48 * block + torch.get_num_threads() * (1200 * d + (96 << 12))
    return 8 * max(n, 1 << 16) + 8 * (n + k)
