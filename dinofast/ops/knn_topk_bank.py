"""knn_topk_bank: knn_topk over the forms that a Bank prepared once."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from dinofast.ops.knn_topk import METRICS, knn_workspace
from dinofast.ops.knn_topk import _reference as search
from dinofast.ops.knn_topk import _verify as verify
from dinofast.ops.registry import Cost, Sample, define
from dinofast.ops.rows import require, result_dtype, row_samples

STRATEGIES = ("float32", "lowp", "pruned")
"""Those that give the same results."""


CODED = ("rows", "center", "weight", "codes", "scale", "bias", "error")
GROUPED = (
    *("rows", "center", "row", "starts", "centroids", "radius"),
    *("basis", "outline_weight", "outline_codes", "outline_scale", "outline_tail", "outline_bias"),
)
BOTH = GROUPED + CODED[2:]
"""The tensors behind a Bank on the CPU, in the order of the operator's list: the rows alone, or one of these.

Columns come in panels of 32, P in all. In a grouped bank a column is a row in the order of the groups, or
padding; else column i is row i, and those behind the last row are padding.

- rows: (M, D), float32, finite; for cosine of unit norm or zero.
- center: (D,), float32, subtracted before quantization.

Coded:

- weight: (1,), float32, how the bound on the quantization error is shared by its two sides.
- codes: (P · 4 · ceil(D / 4),), uint8, panel after panel.
- scale: (P,), float32, of the codes.
- bias: (P,), float32, what a column adds to a product, at most.
- error: (P / 32,), float32, half of what a column of a panel may add too much.

Grouped:

- row: (P,), int64, the row of a column; −1 for padding.
- starts: (G + 1,), int64, first column of each group.
- centroids: (G, D), float32.
- radius: (G,), float32: no row of the group is farther from its centroid.
- basis: (D, H), float32, H <= D, orthonormal columns. The outline of a row is its coordinates in this basis
  and the norm of what they leave, on two levels: the first min(H, 32) directions, and all H.
- outline_weight: (3,), float32: weight for each level, and a bound on how far the basis is from orthonormal.
- outline_codes: (P · 4 · T,), uint8, T the quads of channels of both levels: codes of the first coordinates
  of all columns, then of the others.
- outline_scale, outline_bias: (2, P), float32: as for the rows, for each level.
- outline_tail: (2, P), float32: the norm of what the directions of a level leave.
"""
PANEL = 32
NEAR = 32  # directions of the first level


def outline_quads(directions: int) -> int:
    """Count the groups of four channels in the outlines of a row."""
    near = min(directions, NEAR)
    return (near + 3) // 4 + (directions - near + 3) // 4


def forms_of(packed: list[Tensor]) -> dict[str, Tensor]:
    """Name the tensors of a list.

    Raises:
        RuntimeError: its length is that of no kind of bank.
    """
    names = {len(names): names for names in (CODED[:1], CODED, GROUPED, BOTH)}.get(len(packed), ())
    require(
        len(names) > 0,
        lambda: (
            f"knn_topk: a packed bank has 1, {len(CODED)}, {len(GROUPED)} or {len(BOTH)} tensors, "
            f"got {len(packed)}"
        ),
    )
    return dict(zip(names, packed, strict=True))


def _check_packed(packed: list[Tensor]) -> None:
    """Refuse a list whose tensors do not fit together, before native code reads by their sizes."""
    forms = forms_of(packed)
    rows = forms["rows"]
    require(rows.dim() == 2, lambda: f"knn_topk: packed rows must be a matrix, got {rows.dim()} dimensions")
    if len(packed) == 1:
        return
    (m, d), p = rows.shape, columns_of(forms)
    require(p % PANEL == 0, lambda: f"knn_topk: a packed bank has whole panels of {PANEL}, got {p} columns")
    shapes: dict[str, tuple[int, ...]] = {"rows": (m, d), "center": (d,)}
    if "codes" in forms:
        shapes |= {"weight": (1,), "codes": (p * 4 * ((d + 3) // 4),), "error": (p // PANEL,)}
        shapes |= dict.fromkeys(("scale", "bias"), (p,))
    if "row" not in forms:
        least = (m + PANEL - 1) // PANEL * PANEL
        require(p == least, lambda: f"knn_topk: a packed bank of {m} rows has {least} columns, got {p}")
    else:
        g, h = forms["radius"].numel(), forms["basis"].shape[-1] if forms["basis"].dim() else 0
        require(h <= d, lambda: f"knn_topk: packed basis has {h} directions in {d} channels")
        shapes |= {"row": (p,), "starts": (g + 1,), "centroids": (g, d), "radius": (g,), "basis": (d, h)}
        shapes |= {"outline_weight": (3,), "outline_codes": (p * 4 * outline_quads(h),)}
        shapes |= dict.fromkeys(("outline_scale", "outline_tail", "outline_bias"), (2, p))
    for name, shape in shapes.items():
        _check_form(name, forms[name], shape, rows.device)


def columns_of(forms: dict[str, Tensor]) -> int:
    """Count the columns of a coded or grouped bank."""
    return forms["row" if "row" in forms else "scale"].numel()


def _check_form(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    whole = torch.int64 if name in ("row", "starts") else torch.float32
    dtype = torch.uint8 if name.endswith("codes") else whole
    require(
        x.dtype == dtype and x.shape == shape and x.is_contiguous() and x.device == device,
        lambda: (
            f"knn_topk: packed {name} must be contiguous {dtype} {shape} on {device}, got {x.dtype} "
            f"{tuple(x.shape)} of strides {x.stride()} on {x.device}; let Bank pack the rows"
        ),
    )


def check_numbers(packed: list[Tensor]) -> None:
    """Refuse row numbers and groups that native code would read out of bounds.

    Raises:
        RuntimeError: naming the form and its range.
    """
    forms = forms_of(packed)
    if "row" not in forms:
        return
    m, row = packed[0].shape[0], forms["row"]
    low, high = (int(x) for x in row.aminmax()) if len(row) else (0, 0)
    require(low >= -1 and high < m, lambda: f"knn_topk: packed row numbers {low} .. {high}, M is {m}")
    held = int((row >= 0).sum())
    require(held == m, lambda: f"knn_topk: a packed bank has a column for each of {m} rows, got {held}")
    starts = forms["starts"].tolist()
    rising = all(a <= b and a % PANEL == 0 for a, b in pairwise(starts))
    require(
        rising and starts[0] == 0 and starts[-1] == len(row),
        lambda: f"knn_topk: packed starts must rise from 0 to {len(row)} in steps of {PANEL}",
    )


def _reference(
    queries: Tensor, packed: list[Tensor], k: int, metric: str, probes: int
) -> tuple[Tensor, Tensor, Tensor]:
    _fake(queries, packed, k, metric, probes)
    dtype = result_dtype(queries)
    distance, index = search(queries.to(dtype), packed[0].to(dtype), k, metric)
    return (
        distance,
        index,
        torch.tensor([0, 0, packed[0].shape[0]], device=index.device).repeat(len(index), 1),
    )


def _fake(
    queries: Tensor, packed: list[Tensor], k: int, metric: str, probes: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check_packed(packed)
    m, d = packed[0].shape
    require(queries.dim() == 2, lambda: f"knn_topk: queries must be a matrix, got {queries.dim()} dimensions")
    require(
        queries.is_floating_point(), lambda: f"knn_topk: queries must be floating point, got {queries.dtype}"
    )
    require(queries.shape[1] == d, lambda: f"knn_topk: D differs, queries {queries.shape[1]} and bank {d}")
    if queries.device != packed[0].device:
        raise RuntimeError(f"knn_topk: device differs, queries {queries.device} and bank {packed[0].device}")
    require(k >= 1, lambda: f"knn_topk: k must be at least 1, got {k}")
    require(k <= m, lambda: f"knn_topk: k = {k} exceeds the bank's {m} rows")
    require(metric in METRICS, lambda: f"knn_topk: unknown metric {metric!r}; one of {', '.join(METRICS)}")
    q = queries.shape[0]
    return (
        queries.new_empty((q, k), dtype=result_dtype(queries)),
        queries.new_empty((q, k), dtype=torch.int64),
        queries.new_empty((q, 3), dtype=torch.int64),
    )


def _verify(args: tuple[object, ...], results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    queries, packed, k, metric, _ = args
    assert isinstance(packed, list)
    verify((queries, packed[0], k, metric), results[:2], truth[:2])
    assert bool((results[2] >= 0).all()), "negative count of columns"


def _cost(queries: Tensor, packed: list[Tensor], k: int, metric: str, probes: int) -> Cost:
    (q, d), m = queries.shape, packed[0].shape[0]
    return Cost(bytes=q * d * queries.element_size() + m * d + q * k * 12, flops=2 * q * m * d)


def _samples() -> list[Sample]:
    from dinofast.ops.bank import Bank  # which imports this file

    found: list[Sample] = []
    for metric in METRICS:
        for pair in row_samples((30, 1100)):
            queries, rows = pair.args
            if "huge" in pair.name and metric != "cosine":
                continue
            strategy = STRATEGIES[len(found) % len(STRATEGIES)]
            packed, k = Bank(rows, metric, strategy).packed, min(2, rows.shape[0])
            found.append(Sample(f"{pair.name} {metric} {strategy}", (queries, packed, k, metric, 0)))
    return found


OP = define(
    "knn_topk_bank(Tensor queries, Tensor[] packed, int k, str metric, int probes)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    samples=_samples,
    cost=_cost,
    inputs=(0,),
    verify=_verify,
    workspace=lambda device, x, packed, k, _metric, _probes: knn_workspace(device, x, len(packed[0]), k),
)
