"""The memory bank: a patch is as abnormal as it is far from the nearest patches of normal images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from dinofast.errors import ArtifactError, InputError
from dinofast.interop import TensorBatches
from dinofast.models.base import checked_stream
from dinofast.models.foreground import foreground_mask
from dinofast.models.image_score import top_percent
from dinofast.models.row_store import RowStore
from dinofast.models.searched import SearchedModel
from dinofast.ops import cosine_max, knn_topk, upsample_blur
from dinofast.ops.bank import FEW
from dinofast.ops.rows import accurate_unit_rows, normalize_rows
from dinofast.types import Features, Scores

METRICS = ("cosine", "euclidean")
COMPAT = {
    "anomalydino": {"mode": "bilinear", "boundary": "reflect", "morphology": "1d"},
    "anomalib": {"mode": "nearest", "boundary": "mirror", "morphology": "2d"},
}
"""Name -> what that implementation does differently; references are masked by default only in anomalib's."""


class MemoryBank(SearchedModel):
    """Keep every patch of the normal images; score a patch by its distance to the nearest of them.

    Image score: the mean of the top 1 % of the patch scores, T = floor(P / 100) of an image's P patches,
    masked ones included as 0; the largest where P < 100. Map: patch scores brought to pixels and blurred.

    Args:
        n_neighbors: bank rows k that a patch is compared with, at least 1.
        metric: "cosine": mean over the k nearest of 1 − cosine, in [0, 2]; a zero patch is at distance 1 from
            everything. "euclidean": root of the mean over the k nearest of the squared distance, at least 0.
        masking: score the foreground only (`foreground_mask`); other patches get 0.
        mask_threshold: threshold of the mask in the units of the backbone's tokens; needed with `masking`. A
            `Detector` fills in 10.0, the published value, when its backbone is a DINOv2.
        mask_references: keep only the foreground of the normal images too. None follows `compat`: False for
            "anomalydino", as `masking` for "anomalib".
        sigma: standard deviation of the Gaussian over the map, in pixels; 0 does not blur.
        compat: whose rule where two implementations disagree. "anomalydino", the authors': bilinear map,
            edge pixel repeated under the blur, mask closed in raster order. "anomalib": nearest-neighbor map,
            edge pixel not repeated, mask closed on the grid.

    Features may be float32, bfloat16 or float16; the bank and all distances are float32. Search is
    exhaustive, so the order of images and batches changes scores by float32 rounding at most.

    From 4096 rows on, a search on the CPU prepares them, see `SearchedModel`. For a single neighbor by
    cosine, distances of so many rows come from Σ(x−y)²/2, of fewer from 1 − cosine, which differs by at most
    1e-6. Rows are of unit length for the cosine metric; a zero patch stays zero.

    Memory: the bank takes 4 · M · D bytes for M patches. `fit` holds the bank, one batch with its
    temporaries and at most 64 MiB more; for features on another device, the growing bank is on the host.
    `merge` and `partial_fit` hold the result beside what there was before.

    Raises:
        InputError: a parameter out of range.

    References:
        Damm et al., "AnomalyDINO: boosting patch-based few-shot anomaly detection with DINOv2", WACV 2025,
        arXiv 2405.14529.

    >>> normal = Features(torch.randn(4, 8, 8, 16), None, (32, 32))
    >>> bank = MemoryBank().fit([normal])
    >>> scores = bank.score(normal)
    >>> bool((scores.score < 1e-6).all()), tuple(scores.map.shape)
    (True, (4, 32, 32))
    """

    name: ClassVar[str] = "memory_bank"

    def __init__(
        self,
        n_neighbors: int = 1,
        metric: str = "cosine",
        masking: bool = False,
        mask_threshold: float | None = None,
        mask_references: bool | None = None,
        sigma: float = 4.0,
        compat: str = "anomalydino",
    ) -> None:
        super().__init__()
        if not isinstance(n_neighbors, int) or n_neighbors < 1:
            raise InputError(f"n_neighbors must be a whole number, at least 1, got {n_neighbors!r}")
        if metric not in METRICS:
            raise InputError(f"unknown metric {metric!r}; one of {', '.join(METRICS)}")
        if compat not in COMPAT:
            raise InputError(f"unknown compat {compat!r}; one of {', '.join(COMPAT)}")
        if not 0 <= sigma < math.inf:
            raise InputError(f"sigma must be finite and at least 0, got {sigma}")
        if mask_references and not masking:
            raise InputError("mask_references=True needs masking=True")
        self.n_neighbors = n_neighbors
        self.metric = metric
        self.masking = masking
        self.mask_threshold = mask_threshold
        self.mask_references = mask_references
        self.sigma = sigma
        self.compat = compat

    @property
    def n_channels(self) -> int:
        """D of the features that the model was fitted on."""
        return self.bank.shape[1]

    @torch.no_grad()
    def score_set(self, features: Iterable[Features]) -> Scores:
        """Score a set of images without references: each against the patches of all the others.

        With N patches in the other images, a patch's score is the mean of its cosine distances that are
        strictly below the one of rank floor(N / 1000), counted from 1; where none is below (N < 2000, or
        ties), that one is the score. `n_neighbors` plays no part, and what the model has
        learned is neither used nor changed. Image scores and maps are as in `score`, so sets of images with
        fewer than 100 patches get their largest patch score, where the published variant has none.

        All patches of the set are held once, 4 · B · h · w · D bytes, beside the maps of the result and
        O(h · w · N / 1000) for the search; time grows with the square of the set.

        Args:
            features: batches with tensors (B, h, w, D), finite, of one grid, one D and one image size.

        Returns:
            Scores of all images, in order, on their device, of the kind of the first batch's tensor.

        Raises:
            InputError: see `fit`; another metric than "cosine"; grids or image sizes differ; N < 1000.
        """
        if self.metric != "cosine":
            raise InputError(f"score_set is defined for the cosine metric, this model has {self.metric!r}")
        with TensorBatches(features) as batches:
            return batches.given(self._score_set(checked_stream(batches)))

    def _score_set(self, features: Iterator[Features]) -> Scores:
        store, spans, masks, shapes = RowStore(), [0], [], set()
        for batch in features:
            shapes.add((tuple(batch.tensor.shape[1:3]), batch.image_size))
            if len(shapes) > 1:
                raise InputError(
                    "score_set wants one patch grid and one image size, got "
                    + " and ".join(f"{grid} at {size}" for grid, size in sorted(shapes))
                )
            mask = self._mask(batch.tensor)
            if mask is None:
                mask = torch.ones(batch.tensor.shape[:3], dtype=torch.bool, device=batch.tensor.device)
            for tokens, kept in zip(batch.tensor, mask, strict=True):
                store.append(
                    normalize_rows(tokens[kept] if self._masks_references() else tokens.flatten(0, 1))
                )
                spans.append(len(store))
            masks.append(mask)
        fewest = min(len(store) - (end - start) for start, end in pairwise(spans))
        if fewest < 1000:
            raise InputError(
                f"score_set: the images beside one have {fewest} patches, fewer than the 1000 that its 0.1 % "
                "rule needs; give more or larger images, or fit on normal images and use score."
            )
        bank, mask = store.gather(masks[0].device), torch.cat(masks)
        patches = torch.zeros(mask.shape, device=bank.device)
        for image, (start, end) in enumerate(pairwise(spans)):
            queries = bank[start:end]
            if not self._masks_references():
                queries = queries[mask[image].flatten()]
            others = bank[:start], bank[end:]
            patches[image][mask[image]] = mean_below_rank(queries, others, sum(map(len, others)) // 1000)
        return self._summarize(patches, batch.image_size)

    def waits_for(self) -> str | None:
        """Tell that a mask decides how many patches are searched, see `Model.waits_for`."""
        if not self.masking:
            return None
        return "masking=True searches as many patches as its mask leaves; choose masking=False"

    def _learn(self, features: Iterator[Features]) -> dict[str, Tensor]:
        if self.masking:
            self._threshold()
        store, device = RowStore(), None
        for batch in features:
            device = device or batch.tensor.device
            mask = self._mask(batch.tensor) if self._masks_references() else None
            kept = batch.tensor.flatten(0, 2) if mask is None else batch.tensor[mask]
            store.append(accurate_unit_rows(kept) if self.metric == "cosine" else kept)
        if len(store) < self.n_neighbors:
            raise InputError(
                f"the bank has {len(store)} rows, n_neighbors is {self.n_neighbors}; "
                + ("lower mask_threshold or " if self._masks_references() else "")
                + "give more normal images."
            )
        return {"bank": store.gather(device)}

    def _merged(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"bank": torch.cat([self.bank, other["bank"]])}

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != {"bank"}:
            raise ArtifactError(f"a memory bank holds one tensor, bank; this holds {sorted(state)}")
        bank, k = state["bank"], self.n_neighbors
        if bank.dim() != 2 or bank.dtype != torch.float32 or bank.shape[0] < k or bank.shape[1] < 1:
            raise ArtifactError(
                f"a bank for n_neighbors={k} must be float32 (M, D) with M >= {k}, "
                f"this is {bank.dtype} {tuple(bank.shape)}"
            )

    def _patch_scores(self, features: Features) -> Tensor:
        tensor = features.tensor
        mask = self._mask(tensor)
        queries = tensor.flatten(0, 2) if mask is None else tensor[mask]
        distance = self._distance(queries.float())
        if mask is None:
            return distance.view(tensor.shape[:3])
        scores = torch.zeros(mask.shape, device=tensor.device)
        scores[mask] = distance
        return scores

    @property
    def _metric_searched(self) -> str:
        return "sqeuclidean" if self.metric == "euclidean" else "cosine"

    def _distance(self, queries: Tensor) -> Tensor:
        """Score float32 queries (Q, D); gives (Q,)."""
        k = self.n_neighbors
        if self.metric == "euclidean":
            metric = self._metric_searched
            return knn_topk(queries, self._searched(metric), k, metric)[0].mean(dim=1).sqrt()
        if k == 1 and not (self.bank.is_cpu and len(self.bank) >= FEW):
            return 1 - cosine_max(queries, self.bank)[0]
        return knn_topk(queries, self._searched("cosine"), k)[0].mean(dim=1)

    def _summarize(self, patches: Tensor, image_size: tuple[int, int]) -> Scores:
        rule = COMPAT[self.compat]
        pixels = upsample_blur(patches, image_size, self.sigma, rule["mode"], rule["boundary"])
        return Scores(top_percent(patches), pixels)

    def _masks_references(self) -> bool:
        if self.mask_references is None:
            return self.masking and self.compat == "anomalib"
        return self.mask_references

    def _mask(self, tokens: Tensor) -> Tensor | None:
        """Give (B, h, w) bool, True where a patch takes part; None where all do."""
        if not self.masking:
            return None
        return foreground_mask(tokens, self._threshold(), COMPAT[self.compat]["morphology"])

    def _threshold(self) -> float:
        if self.mask_threshold is None:
            raise InputError(
                "masking needs mask_threshold, in the units of the backbone's tokens: 10.0 for DINOv2's last "
                "block, which a Detector fills in for such backbones; find a value of your own for any other."
            )
        return self.mask_threshold


def mean_below_rank(queries: Tensor, parts: Iterable[Tensor], rank: int) -> Tensor:
    """Average each query's cosine distances strictly below the one of a rank; that one where ties leave none.

    Args:
        queries: (Q, D).
        parts: rows (N1, D), (N2, D), ... to compare with, N >= rank together.
        rank: counted from 1.

    Returns:
        (Q,).
    """
    distance = queries.new_zeros(len(queries), 0)
    for part in parts:
        if len(part):
            near = knn_topk(queries, part, min(rank, len(part)))[0]
            distance = torch.cat([distance, near], dim=1).sort(dim=1).values[:, :rank]
    limit = distance[:, -1:]
    below = distance < limit
    mean = torch.where(below, distance, 0).sum(dim=1) / below.sum(dim=1)
    return torch.where(below.any(dim=1), mean, limit[:, 0])
