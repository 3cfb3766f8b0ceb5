"""What a Bank takes for rows: floating-point matrices, finite, of unit norm where cosines are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dinofast.errors import InputError
from dinofast.ops import providers
from dinofast.ops.rows import BLOCK, normalize_rows

UNIT = 4.5e-7  # how far from 1 a norm may be that the kernels take as it is; they take 2**-21


def check_rows(rows: Tensor) -> None:
    """Refuse what is no floating-point matrix with rows and channels."""
    if rows.dim() != 2 or not rows.is_floating_point():
        raise InputError(f"Bank: rows must be a floating-point matrix, got {rows.dtype} {tuple(rows.shape)}")
    if rows.shape[0] == 0 or rows.shape[1] == 0:
        raise InputError(f"Bank: no rows or no channels, got {tuple(rows.shape)}")


def prepare(rows: Tensor, metric: str) -> Tensor:
    """Copy rows to contiguous float32, of unit norm for cosine; refuse what is no bank."""
    check_rows(rows)
    rows = rows.detach().to(torch.float32)
    check_finite(rows)
    if metric != "cosine":
        return rows.clone(memory_format=torch.contiguous_format)
    return providers.unit_rows(rows) if rows.device.type == "cpu" else normalize_rows(rows)


def check_prepared(rows: Tensor, metric: str) -> None:
    """Refuse what `_prepare` cannot have given."""
    check_rows(rows)
    if rows.dtype != torch.float32 or not rows.is_contiguous():
        raise InputError(
            f"Bank: rows must be contiguous float32, got {rows.dtype} of strides {rows.stride()}"
        )
    check_finite(rows)
    for start, block in _blocks(rows) if metric == "cosine" else ():
        norm = block.double().norm(dim=1)
        wrong = ((norm != 0) & ((norm - 1).abs() > UNIT)).nonzero()
        if len(wrong):
            off = f"{norm[wrong[0]].item() - 1:+.2g} off 1, more than {UNIT}"
            raise InputError(
                f"Bank: the norm of row {start + int(wrong[0])} is {off}; "
                "divide rows by float64 norms, or let Bank copy them"
            )


def _blocks(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = max(1, BLOCK // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        yield start, rows[start : start + step]


def check_finite(rows: Tensor, between: Callable[[], None] = lambda: None) -> None:
    """Refuse NaN and inf; `between` is called before each block of rows."""
    for start, block in _blocks(rows):
        between()
        if not bool(block.sum().isfinite()):  # a sum of finite rows may overflow, so look closer
            broken = (~block.isfinite().all(dim=1)).nonzero()
            if len(broken):
                raise InputError(f"Bank: row {start + int(broken[0])} holds NaN or inf; remove it")


def keep_half(rows: Tensor, adopt: bool) -> Tensor:
    """Copy bfloat16 rows as they are, or adopt them; refuse what is no bank."""
    check_rows(rows)
    check_finite(rows)
    if not adopt:
        return rows.detach().clone(memory_format=torch.contiguous_format)
    if not rows.is_contiguous():
        raise InputError(f"Bank: rows to adopt must be contiguous, got strides {rows.stride()}")
    return rows.detach()
