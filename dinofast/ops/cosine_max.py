"""cosine_max: the best cosine similarity of every feature to a set of prototypes, and which one it is."""

from __future__ import annotations

import torch
from torch import Tensor

from dinofast.ops.registry import Cost, define
from dinofast.ops.rows import (
    BLOCK,
    check_rows,
    normalize_rows,
    result_dtype,
    row_blocks,
    row_samples,
    search_workspace,
)


def cosine_max(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Find the prototype most similar to each feature; both are normalized inside.

    The (N, K) matrix of similarities is never written.

    Args:
        features: (N, D), float32, bfloat16, float16 or float64.
        prototypes: (K, D), K >= 1, same dtype and device.

    Returns:
        similarity: (N,), cosine in [-1, 1], float32 (float64 for float64 arguments). A zero row has
            similarity 0 to everything; a feature row with NaN or inf gives NaN, and one such prototype makes
            every similarity NaN.
        index: (N,), int64, in [0, K): the prototype that reaches it; among bitwise equal similarities the
            smallest index. Where the similarity is NaN the index is valid and means nothing.

    Raises:
        RuntimeError: not matrices, D or dtype or device differ, D = 0, or no prototypes.

    >>> similarity, index = cosine_max(torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0], [3.0, 3.0]]))
    >>> round(similarity.item(), 4), index.item()
    (0.7071, 1)
    """
    similarity, index = torch.ops.dinofast.cosine_max.default(features, prototypes)
    return similarity, index


def _reference(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    _fake(features, prototypes)
    columns = normalize_rows(prototypes).T
    blocks = row_blocks(features, BLOCK // columns.shape[1])
    best = [(normalize_rows(rows) @ columns).max(dim=1) for rows in blocks]
    if features.shape[0] == 0:
        return _fake(features, prototypes)
    return torch.cat([b.values for b in best]).clamp(-1, 1), torch.cat([b.indices for b in best])


def _fake(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    check_rows("cosine_max", features=features, prototypes=prototypes)
    n = features.shape[0]
    return features.new_empty(n, dtype=result_dtype(features)), features.new_empty(n, dtype=torch.int64)


def _verify(args: tuple[Tensor, ...], results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    """Hold the index to its meaning: the prototype it names reaches the true similarity."""
    features, prototypes = args
    similarity, index = truth[0], results[1]
    assert bool(((index >= 0) & (index < prototypes.shape[0])).all()), "index outside [0, K)"
    reached = (normalize_rows(features.double()) * normalize_rows(prototypes.double())[index]).sum(dim=1)
    slack = 2e-6 + 2 * torch.finfo(args[0].dtype).eps
    short = (similarity - reached)[~similarity.isnan()]
    assert short.numel() == 0 or short.max().item() <= slack, (
        f"a named prototype misses the best by {short.max()}"
    )


def _cost(features: Tensor, prototypes: Tensor) -> Cost:
    (n, d), k = features.shape, prototypes.shape[0]
    return Cost(bytes=(n + k) * d * features.element_size() + n * 12, flops=2 * n * k * d)


OP = define(
    "cosine_max(Tensor features, Tensor prototypes) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    samples=lambda: row_samples((97, 150), (13, 1030)),
    cost=_cost,
    inputs=(0, 1),
    verify=_verify,
    differentiable=True,
    workspace=lambda device, x, y: search_workspace(device, len(x), *y.shape),
)
