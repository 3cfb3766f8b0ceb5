"""Names of AnomalyDINO's scripts on dinofast's operators: search, image score, map, sets without references.

Scores are the host's; NumPy, torch and CuPy arrays go in, and the same kind comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dinofast.drop_in.flat_search import matrix
from dinofast.errors import InputError
from dinofast.interop import like, on_callers_stream, to_tensor
from dinofast.models.memory_bank import mean_below_rank
from dinofast.ops import Bank, knn_topk, upsample_blur

METRICS = ("L2_normalized", "L2")


@on_callers_stream
class Search:
    """The search among reference patches that the host builds with faiss, prepared once for all images.

    Args:
        features_ref: reference patches (M, D), M >= 1, finite.
        knn_metric: "L2_normalized": mean over the k nearest of 1 − cosine; "L2": root of the mean squared
            distance.
        k_neighbors: k, in [1, M].

    Raises:
        InputError: an unknown metric, no rows, NaN rows, or k out of range.

    >>> import numpy as np
    >>> search = Search(np.eye(3, dtype=np.float32))
    >>> search(np.array([[0, 2, 0]], np.float32)).tolist()
    [0.0]
    """

    def __init__(self, features_ref: Any, knn_metric: str = "L2_normalized", k_neighbors: int = 1) -> None:
        if knn_metric not in METRICS:
            raise InputError(f"knn_metric {knn_metric!r}: one of {', '.join(METRICS)}")
        rows = to_tensor(features_ref, "features_ref").float()
        self._metric = "cosine" if knn_metric == "L2_normalized" else "sqeuclidean"
        self._bank = Bank(rows, self._metric)
        if not 1 <= k_neighbors <= len(self._bank):
            raise InputError(f"k_neighbors must be in [1, {len(self._bank)}], got {k_neighbors}")
        self.knn_metric, self.k_neighbors = knn_metric, k_neighbors

    def __call__(self, features: Any) -> Any:
        """Score the patches (Q, D) of one image; gives (Q,) float32, of the kind that came in."""
        queries = matrix(features, self._bank.rows.shape[1], "features")
        mean = knn_topk(queries, self._bank, self.k_neighbors, self._metric)[0].mean(dim=1)
        return like(mean if self._metric == "cosine" else mean.sqrt(), features)


@on_callers_stream
def mean_top1p(distances: Any) -> float:
    """Give an image's score: the mean of the largest 1 % of its patch scores, the largest under 100 patches.

    Raises:
        InputError: no patches.
    """
    flat = to_tensor(distances, "distances").flatten().double()
    if not len(flat):
        raise InputError("distances: there are no patches to score")
    return float(flat.topk(max(1, int(len(flat) * 0.01))).values.mean())


@on_callers_stream
def dists2map(dists: Any, img_shape: Sequence[int]) -> Any:
    """Bring patch scores (h, w) to an image's pixels: bilinear, then a Gaussian of sigma 4.

    Args:
        dists: patch scores (h, w).
        img_shape: (H, W) or (H, W, channels).

    Returns:
        Map (H, W), float32, of the kind that came in.

    Raises:
        InputError: no grid, or no size.
    """
    grid = to_tensor(dists, "dists")
    if grid.dim() != 2 or len(img_shape) < 2:
        raise InputError(
            f"dists must be (h, w) and img_shape (H, W), got {tuple(grid.shape)} and {img_shape}"
        )
    size = int(img_shape[0]), int(img_shape[1])
    return like(upsample_blur(grid.float()[None].contiguous(), size, 4.0, "bilinear", "reflect")[0], dists)


@on_callers_stream
def calculate_cosine_distances(
    features_all: Sequence[Any],
    sample_index: int,
    device: str | torch.device = "cpu",
    quantile: float = 0.001,
) -> Any:
    """Score one image of a set against the patches of all the others.

    Args:
        features_all: patches (P, D) of every image.
        sample_index: the image to score.
        device: where to compute.
        quantile: the mean is taken of the distances strictly below the one of rank ⌊quantile · N⌋ among the
            N patches of the others, counted from 1.

    Returns:
        Scores (P,), NumPy.

    Raises:
        InputError: no such image, no others, another D, or a rank of 0.
    """
    if not 0 <= sample_index < len(features_all) or len(features_all) < 2:
        raise InputError(
            f"sample_index {sample_index} of {len(features_all)} images; there must be others, too"
        )
    scored = to_tensor(features_all[sample_index], "features_all")
    queries = matrix(scored, int(scored.shape[-1]) if scored.dim() else 0, "features_all").to(device)
    images = (features for i, features in enumerate(features_all) if i != sample_index)
    others = [matrix(features, queries.shape[1], "features_all") for features in images]
    patches = sum(map(len, others))
    rank = int(quantile * patches)
    if rank < 1:
        raise InputError(f"quantile {quantile} of {patches} patches is none: more images or a larger one")
    return mean_below_rank(queries, (part.to(device) for part in others), rank).cpu().numpy()
