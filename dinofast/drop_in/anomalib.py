"""anomalib's PatchCore and AnomalyDINO on dinofast's operators, in place or under the same names.

`patched()` replaces, inside a `with` block, the search of `PatchcoreModel`, the forward pass of
`AnomalyDINOModel` after its features, the selection of `KCenterGreedy` and the map of `AnomalyMapGenerator`.
Scores, maps and random choices are anomalib's (2.7) up to rounding; no matrix of all distances is made. The
classes below do the same on plain tensors, without anomalib.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dinofast.errors import InputError
from dinofast.models.coreset import k_center
from dinofast.ops import Bank, knn_topk, upsample_blur
from dinofast.ops.bank import FEW

_banks: WeakKeyDictionary[nn.Module, tuple[Tensor, int, str, Bank]] = WeakKeyDictionary()


@contextmanager
def patched() -> Iterator[None]:
    """Let the installed anomalib compute on dinofast inside a `with` block.

    Raises:
        InputError: anomalib is not installed, or does not have the names that 2.7 has.
    """
    models = "anomalib.models"
    replaced = (
        (f"{models}.image.patchcore.torch_model", "PatchcoreModel.nearest_neighbors", _nearest_neighbors),
        (f"{models}.image.patchcore.anomaly_map", "AnomalyMapGenerator.compute_anomaly_map", _anomaly_map),
        (f"{models}.components.sampling.k_center_greedy", "KCenterGreedy.select_coreset_idxs", _select),
        (f"{models}.image.anomaly_dino.torch_model", "AnomalyDINOModel.forward", _forward),
    )
    with ExitStack() as stack:
        for module, path, function in replaced:
            owner, method = path.split(".")
            try:
                host = getattr(importlib.import_module(module), owner)
                getattr(host, method)
            except (ImportError, AttributeError, RuntimeError) as error:
                raise InputError(
                    f"{module}.{path} is not there ({error}); patching wants anomalib 2.7, which runs here"
                ) from error
            stack.enter_context(mock.patch.object(host, method, function))
        yield


def nearest_neighbors(
    embedding: Tensor, memory_bank: Tensor | Bank, n_neighbors: int
) -> tuple[Tensor, Tensor]:
    """Find neighbors as `PatchcoreModel.nearest_neighbors` does.

    Args:
        embedding: (Q, D).
        memory_bank: (M, D), or a Bank of metric "euclidean".
        n_neighbors: k, in [1, M].

    Returns:
        Euclidean distances and row numbers: (Q,) for k = 1, else (Q, k), ascending.
    """
    distance, index = knn_topk(embedding.detach(), memory_bank, n_neighbors, "euclidean")
    distance = distance.to(embedding.dtype)
    return (distance[:, 0], index[:, 0]) if n_neighbors == 1 else (distance, index)


class KCenterGreedy:
    """Greedy coreset, as anomalib's class of this name: a random projection, a random row, then the farthest.

    Random choices follow torch's global generator.

    Args:
        embedding: rows (N, D).
        sampling_ratio: share to select, in (0, 1].

    Raises:
        ValueError: the share selects no row.
    """

    def __init__(self, embedding: Tensor, sampling_ratio: float) -> None:
        self.embedding = embedding
        self.n_observations = embedding.shape[0]
        self.coreset_size = int(self.n_observations * sampling_ratio)
        if self.coreset_size <= 0:
            raise InputError(
                f"sampling_ratio {sampling_ratio} of {self.n_observations} rows selects none; "
                f"give at least {1 / max(1, self.n_observations):.2g}"
            )

    def select_coreset_idxs(self) -> list[int]:
        """Give the numbers of the selected rows, in order of selection."""
        seed = int(torch.randint(1 << 62, ()).item())
        rows = self.embedding.flatten(1)
        found: list[int] = k_center(rows, self.coreset_size, projection="sparse-jl", seed=seed).tolist()
        return found

    def sample_coreset(self) -> Tensor:
        """Give the selected rows (K, D)."""
        return self.embedding[self.select_coreset_idxs()]


class AnomalyMapGenerator(nn.Module):
    """Patch scores to pixels as anomalib's class of this name: nearest neighbor, then a Gaussian.

    Args:
        sigma: of the Gaussian, in pixels.
    """

    def __init__(self, sigma: float = 4) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, patch_scores: Tensor, image_size: tuple[int, int] | None = None) -> Tensor:
        """Bring scores (B, 1, h, w) to maps (B, 1, H, W); without a size H, W = h, w."""
        size = tuple(patch_scores.shape[-2:]) if image_size is None else tuple(image_size)
        return _to_pixels(patch_scores, (int(size[0]), int(size[1])), float(self.sigma))


class AnomalyDINOSearch:
    """The scoring of anomalib's AnomalyDINO on plain tensors.

    Args:
        memory_bank: patches of normal images (M, D), of unit norm.
        num_neighbours: k; scores are the mean over them.
    """

    def __init__(self, memory_bank: Tensor, num_neighbours: int = 1) -> None:
        self._bank = Bank(memory_bank, "cosine")
        self.num_neighbours = num_neighbours

    def __call__(self, features: Tensor) -> Tensor:
        """Score patches (Q, D): mean over the k nearest of 1 − cosine, in [0, 2]; gives (Q,)."""
        return knn_topk(features, self._bank, max(1, self.num_neighbours))[0].mean(dim=1)

    @staticmethod
    def mean_top1p(distances: Tensor) -> Tensor:
        """Give image scores (B, 1) of patch scores (B, P): the mean of the largest 1 %, at least one."""
        top = distances.topk(max(int(distances.shape[-1] * 0.01), 1), dim=1).values
        return top.mean(dim=1, keepdim=True)


def _prepared(model: Any, metric: str) -> Tensor | Bank:
    """Give the model's memory bank, prepared once while it stays the same."""
    rows: Tensor = model.memory_bank
    if len(rows) < FEW:
        return rows
    known = _banks.get(model)
    if known is None or known[0] is not rows or known[1:3] != (rows._version, metric):
        known = rows, rows._version, metric, Bank(rows, metric)
        _banks[model] = known
    return known[3]


def _nearest_neighbors(self: Any, embedding: Tensor, n_neighbors: int) -> tuple[Tensor, Tensor]:
    return nearest_neighbors(embedding, _prepared(self, "euclidean"), n_neighbors)


def _select(self: Any) -> list[int]:
    features = self.embedding.reshape(len(self.embedding), -1)
    if self.embedding.ndim == 2:
        self.model.fit(self.embedding)
        features = self.model.transform(self.embedding)
    self.features = features
    self.reset_distances()
    first = int(torch.randint(high=self.n_observations, size=(1,), device=features.device))
    found: list[int] = k_center(features, self.coreset_size, start=first).tolist()
    return found


def _anomaly_map(self: Any, patch_scores: Tensor, image_size: Any = None) -> Tensor:
    size = patch_scores.shape[-2:] if image_size is None else image_size
    return _to_pixels(patch_scores, (int(size[0]), int(size[1])), _sigma(self.blur.kernel))


def _sigma(kernel: Tensor) -> float:
    """Read the standard deviation off a Gaussian kernel (1, 1, n, n): the host keeps nothing else."""
    row = kernel[0, 0, kernel.shape[2] // 2].double()
    center = len(row) // 2
    return float((2 * (row[center] / row[center + 1]).log()).rsqrt())


def _to_pixels(patch_scores: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    maps = upsample_blur(patch_scores[:, 0].float().contiguous(), size, sigma, "nearest", "mirror")
    return maps[:, None].to(patch_scores.dtype)


def _forward(self: Any, input_tensor: Tensor) -> Any:
    """Do what `AnomalyDINOModel.forward` does: crop, embed, mask, then store or score."""
    from anomalib.data import InferenceBatch

    images = input_tensor.type(self.memory_bank.dtype)
    edges = [side % self.patch_size for side in images.shape[-2:]]
    before = [edge // 2 for edge in edges]
    height, width = (side - edge for side, edge in zip(images.shape[-2:], edges, strict=True))
    images = images[..., before[0] : before[0] + height, before[1] : before[1] + width]
    grid = height // self.patch_size, width // self.patch_size
    tokens = self.extract_features(images)
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if self.masking:
        found = self.compute_background_masks(tokens.detach().cpu().numpy(), grid)
        mask = torch.from_numpy(found).to(tokens.device)
    features = nn.functional.normalize(tokens[mask], dim=1)
    if self.training:
        self.embedding_store.append(features)
        return torch.tensor(0.0, device=features.device, requires_grad=True)
    if not self.memory_bank.numel():
        raise RuntimeError("the memory bank is empty; run the model in training mode and call fit() first")
    bank = _prepared(self, "cosine")
    queries = features.detach() if isinstance(bank, Bank) else features.detach().to(bank.dtype)
    scores = torch.zeros(mask.shape, device=mask.device)
    scores[mask] = knn_topk(queries, bank, max(1, self.num_neighbours))[0].mean(dim=1)
    scores = scores.to(self.memory_bank.dtype)
    maps = self.anomaly_map_generator(scores.view(-1, 1, *grid), (height, width))
    after = [edge - start for edge, start in zip(edges, before, strict=True)]
    if any(edges):
        maps = nn.functional.pad(maps, (before[1], after[1], before[0], after[0]), mode="replicate")
    return InferenceBatch(pred_score=self.mean_top1p(scores), anomaly_map=maps)
