"""The prepared forms of a Bank's rows: groups, outlines and codes, as `knn_topk_bank.BOTH` lists them."""

from __future__ import annotations

import torch
from torch import Tensor

from dinofast.ops import providers
from dinofast.ops.knn_topk import knn_rows
from dinofast.ops.knn_topk_bank import NEAR, outline_quads

ROUNDS = 8  # of k-means
DIRECTIONS = 96  # of an outline
SAMPLE = 2048  # rows that these are found from


def group_count(m: int) -> int:
    """Give how many groups M rows get, at most."""
    return max(1, min(2 * int(m**0.5), m // 64, 4096))


def group(rows: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Group rows by k-means: centroids (G, D), radius (G,), group of each row (M,).

    A first draw misses many clusters where there are about as many as centroids; so centroids are added in
    rounds, drawn by the squared distance to the nearest there is, as in k-means||.

    References:
        Bahmani et al., "Scalable k-means++", VLDB 2012, arXiv 1203.6402.
    """
    count = group_count(rows.shape[0])
    generator = torch.Generator().manual_seed(seed)
    sample = rows[torch.randperm(len(rows), generator=generator)[: 32 * count]]
    centroids = sample[: count // 2 or 1].clone()
    for _ in range(ROUNDS):
        distance, group = (x[:, 0] for x in knn_rows(sample, centroids, 1, "sqeuclidean"))
        centroids = _means(sample, group, centroids)
        missing = min(count - len(centroids), -(-count // 8), int((distance > 0).sum()))
        if missing > 0 and bool(distance.isfinite().all()):
            added = torch.multinomial(distance.double(), missing, generator=generator)
            centroids = torch.cat([centroids, sample[added]])
    if not bool(centroids.isfinite().all()):  # norms beyond float32's sums
        centroids = sample[:1].clone()
    distance, group = (x[:, 0] for x in knn_rows(rows, centroids, 1, "euclidean"))
    radius = torch.zeros(len(centroids)).scatter_reduce_(0, group, distance, "amax")
    return centroids, radius * (1 + 1e-6), group


def _means(rows: Tensor, group: Tensor, centroids: Tensor) -> Tensor:
    """Average the rows of each group; a group without rows keeps its centroid."""
    size = torch.bincount(group, minlength=len(centroids))[:, None]
    total = torch.zeros_like(centroids).index_add_(0, group, rows)
    return torch.where(size > 0, total / size.clamp_min(1), centroids)


def _depth(d: int) -> int:
    """Give the directions of an outline of D channels."""
    return min(DIRECTIONS, d // 8 * 4)


def _basis(rows: Tensor, center: Tensor) -> tuple[Tensor, float]:
    """Find the directions (D, H) in which rows vary most, level after level, and a bound on their skew.

    Those of a level are turned within their span, so that no coordinate is much larger than the others: it
    would make the steps of all codes coarse.
    """
    m, d = rows.shape
    depth = _depth(d)
    sample = rows[:: max(1, m // SAMPLE)][:SAMPLE].double() - center
    narrow = d <= len(sample)
    _, vectors = torch.linalg.eigh(sample.T @ sample if narrow else sample @ sample.T)
    most = vectors.flip(1)[:, :depth]
    directions = torch.zeros(d, depth, dtype=torch.float64)
    directions[:, : most.shape[1]] = most if narrow else sample.T @ most
    generator = torch.Generator().manual_seed(0)
    levels = torch.linalg.qr(directions)[0].split([near := min(NEAR, depth), depth - near], dim=1)
    turns = [torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (near, depth - near)]
    turned = [level @ torch.linalg.qr(turn)[0] for level, turn in zip(levels, turns, strict=True)]
    basis = torch.cat(turned, dim=1).float()
    skew = basis.double().T @ basis.double() - torch.eye(depth)
    return basis.contiguous(), float(skew.norm()) * (1 + 1e-6)


def pack(
    rows: Tensor, metric: str, groups: tuple[Tensor, Tensor, Tensor] | None, codes: bool = True
) -> list[Tensor]:
    """Quantize rows as they come, or group after group, each padded to whole panels: outlines, and codes too.

    Without `codes` grouped rows take a third of the memory, and a search that outlines narrow down badly
    reads rows instead.
    """
    center = rows[:: max(1, len(rows) // 1024)].double().mean(dim=0).float()
    packed = [rows, torch.where(center.isfinite(), center, 0)]
    width = providers.int8_columns()
    columns = (len(rows) + width - 1) // width * width
    if groups is not None:
        packed += _grouped(rows, packed[1], groups)
        columns = len(packed[2])
    if groups is None or codes:
        packed += _coded(columns, rows.shape[1])
    providers.quantize_bank(packed, metric)
    return packed


def _coded(columns: int, d: int) -> list[Tensor]:
    return [
        torch.zeros(1),
        torch.zeros(columns * 4 * ((d + 3) // 4), dtype=torch.uint8),
        *(torch.zeros(columns) for _ in ("scale", "bias")),
        torch.zeros(columns // providers.int8_columns()),
    ]


def _grouped(rows: Tensor, center: Tensor, groups: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    centroids, radius, group = groups
    width = providers.int8_columns()
    size = torch.bincount(group, minlength=len(centroids))
    padded = (size + width - 1) // width * width
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), padded.cumsum(0)])
    order = group.argsort(stable=True)
    first = torch.cat([torch.zeros(1, dtype=torch.int64), size.cumsum(0)])[:-1]
    columns = int(starts[-1])
    row = torch.full((columns,), -1, dtype=torch.int64)
    row[starts[group[order]] + torch.arange(len(rows)) - first[group[order]]] = order
    basis, skew = _basis(rows, center)
    return [
        *(row, starts, centroids, radius, basis),
        torch.tensor([0, 0, skew]),
        torch.zeros(columns * 4 * outline_quads(basis.shape[1]), dtype=torch.uint8),
        *(torch.zeros(2, columns) for _ in ("outline_scale", "outline_tail", "outline_bias")),
    ]


def form_bytes(m: int, d: int, grouped: bool, codes: bool) -> int:
    """Tell the bytes that the forms of M rows take beside the rows, see `pack`.

    The last panel of a group is taken to be half full: grouped, that is within a tenth. Rows that are not
    grouped have neither outlines nor such padding, and are told exactly.
    """
    width, bytes = providers.int8_columns(), 4 * (d + 1)  # the center, and a weight
    columns = (m + width - 1) // width * width
    if grouped:
        groups, depth = group_count(m), _depth(d)
        columns = m + groups * (width - 1) // 2 if groups > 1 else columns
        bytes += columns * (4 * outline_quads(depth) + 32)  # codes, 6 numbers and a row number
        bytes += 4 * (groups * (d + 1) + d * depth + 3) + 8 * (groups + 1)
    if codes or not grouped:
        bytes += columns * (4 * ((d + 3) // 4) + 8) + 4 * (columns // width)
    return bytes
