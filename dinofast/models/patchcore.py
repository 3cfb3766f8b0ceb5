"""PatchCore: a memory bank of neighborhood averages, thinned to a coreset, with its own image score."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, avg_pool2d

from dinofast.errors import ArtifactError, InputError
from dinofast.models.coreset import PROJECTIONS, STARTS, k_center
from dinofast.models.params import check_number, check_seed
from dinofast.models.row_store import RowStore
from dinofast.models.searched import SearchedModel
from dinofast.ops import knn_topk, upsample_blur
from dinofast.ops.upsample_blur import MODES
from dinofast.types import Features, Scores

METRICS = ("euclidean", "sqeuclidean")
BORDERS = ("zeros", "partial")
COMPAT: dict[str, dict[str, Any]] = {
    "patchcore": {
        "max_channels": 1024,
        "start": "mean-of-10",
        "projection": "linear-128",
        "metric": "sqeuclidean",
        "n_reweight": 1,
        "upsampling": "bilinear",
        "boundary": "reflect",
    },
    "anomalib-patchcore": {
        "max_channels": 0,
        "start": "random-row",
        "projection": "sparse-jl",
        "metric": "euclidean",
        "n_reweight": 9,
        "upsampling": "nearest",
        "boundary": "mirror",
    },
}
"""Name -> what that implementation does where an argument is None; the blur's boundary is no argument."""


class PatchCore(SearchedModel):
    """Keep a coreset of neighborhood averages of normal patches; score a patch by its distance to them.

    A patch stands for its neighborhood: features are averaged over `neighborhood` × `neighborhood` patches.
    Of all normal patches a share of `coreset_ratio` is kept, chosen greedily (`k_center`), unprojected. A
    patch scores the mean distance to its `n_neighbors` nearest rows. Layers arrive concatenated and on one
    grid from the backbone; the recipe takes two of middle depth, for instance `layers=[7, 10]` of
    efficientnet-lite0, whose backbone averages finer stages to the coarser grid, where the published code
    resizes coarser ones to the finer.

    Image score: the largest patch score s* of an image, that of patch q*. With `n_reweight` = b > 1 it is
    weighted by how alone its nearest row m* is: s* · (1 − exp(|q* − m*|) / Σ exp(|q* − m|)), the sum over the
    b rows m nearest to m*, m* among them.

    Args:
        neighborhood: side of the square of patches averaged, odd; 1 averages none.
        border: a patch at the edge: "zeros" lie beyond the grid and count, as average pooling of the common
            frameworks has it by default; "partial": the average of what is there.
        max_channels: where D is larger, neighboring channels are averaged to this many; 0 keeps D. The
            authors' code, "patchcore", gives 1024 numbers a patch whatever D, by a rule that is not
            specified in detail; this is one reading of it. None follows `compat`.
        coreset_ratio: share of the normal patches kept, in (0, 1]; 1 keeps all as they come.
        start: of the selection, "mean-of-10", "random-row" or "distance-norm", as `k_center` has them; the
            last is the authors' exact sampler, quadratic in N. None follows `compat`.
        projection: distances of the selection are measured in: "linear-128", "sparse-jl", or "none", the
            features themselves; None follows `compat`.
        n_neighbors: k, rows that a patch is compared with, at least 1.
        metric: "euclidean", or "sqeuclidean", the squared distance; None follows `compat`.
        n_reweight: b, rows that the image score is weighted by, at least 1, at most the bank is used; 1 does
            not weight. The distances in the weight are not squared. None follows `compat`.
        upsampling: of the map, "bilinear" or "nearest"; None follows `compat`.
        sigma: standard deviation of the Gaussian over the map, in pixels; 0 does not blur.
        compat: whose rule where an argument is None. "patchcore", the authors' code: up to 1024 channels,
            "mean-of-10", "linear-128", "sqeuclidean", b = 1, "bilinear", edge pixel repeated under the blur.
            "anomalib-patchcore": all channels, "random-row", "sparse-jl", "euclidean", b = 9, "nearest", edge
            pixel not repeated.
        seed: of the selection.

    Features may be float32, bfloat16 or float16; the bank and all distances are float32. Patch scores are at
    least 0. `bank` is the coreset in the order of selection, (M, D), D at most `max_channels`; from 4096 rows
    on a search on the CPU prepares it, see `SearchedModel`. The selection depends on the order of the images,
    not on their batches. Coresets of parts are no coreset of the whole, so models do not merge.

    Memory: `fit` holds all N normal patches, 4 · N · D bytes, once (on the host first when the features come
    from another device), for a projected selection 4 · N more for each projected channel, and the bank.

    Raises:
        InputError: a parameter out of range.

    References:
        Roth et al., "Towards total recall in industrial anomaly detection", CVPR 2022, arXiv 2106.08265.

    >>> normal = Features(torch.randn(4, 8, 8, 16), None, (32, 32))
    >>> model = PatchCore(compat="anomalib-patchcore").fit([normal])
    >>> model.bank.shape, model.score(normal).map.shape
    (torch.Size([25, 16]), torch.Size([4, 32, 32]))
    """

    name: ClassVar[str] = "patchcore"
    merges: ClassVar[bool] = False
    order_free: ClassVar[bool] = False

    def __init__(
        self,
        neighborhood: int = 3,
        border: str = "zeros",
        max_channels: int | None = None,
        coreset_ratio: float = 0.1,
        start: str | None = None,
        projection: str | None = None,
        n_neighbors: int = 1,
        metric: str | None = None,
        n_reweight: int | None = None,
        upsampling: str | None = None,
        sigma: float = 4.0,
        compat: str = "patchcore",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_seed(seed)
        if not isinstance(neighborhood, int) or neighborhood < 1 or neighborhood % 2 == 0:
            raise InputError(f"neighborhood must be odd and at least 1, got {neighborhood!r}")
        check_number("in (0, 1]", lambda v: 0 < v <= 1, coreset_ratio=coreset_ratio)
        check_number("at least 0", lambda v: v >= 0, sigma=sigma)
        for count, value, least in (
            ("n_neighbors", n_neighbors, 1),
            ("n_reweight", n_reweight, 1),
            ("max_channels", max_channels, 0),
        ):
            if value is None and count != "n_neighbors":
                continue
            if not isinstance(value, int) or value < least:
                raise InputError(f"{count} must be a whole number, at least {least}, got {value!r}")
        for option, choice, known in (
            ("compat", compat, tuple(COMPAT)),
            ("border", border, BORDERS),
            ("start", start, (None, *STARTS)),
            ("projection", projection, (None, "none", *PROJECTIONS)),
            ("metric", metric, (None, *METRICS)),
            ("upsampling", upsampling, (None, *MODES)),
        ):
            if choice not in known:
                raise InputError(f"unknown {option} {choice!r}; one of {', '.join(map(str, known))}")
        self.neighborhood = neighborhood
        self.border = border
        self.max_channels = max_channels
        self.coreset_ratio = coreset_ratio
        self.start = start
        self.projection = projection
        self.n_neighbors = n_neighbors
        self.metric = metric
        self.n_reweight = n_reweight
        self.upsampling = upsampling
        self.sigma = sigma
        self.compat = compat
        self.seed = seed

    @property
    def n_channels(self) -> int:
        """D of the features that the model was fitted on."""
        return int(self.state()["n_channels"])

    def _learn(self, features: Iterator[Features]) -> dict[str, Tensor]:
        store, device, d = RowStore(), None, 0
        for batch in features:
            device, d = device or batch.tensor.device, batch.tensor.shape[3]
            store.append(self._pool(batch.tensor).flatten(0, 2))
        kept = int(self.coreset_ratio * len(store))
        if kept < self.n_neighbors:
            raise InputError(
                f"coreset_ratio={self.coreset_ratio} of {len(store)} normal patches keeps {kept}, "
                f"n_neighbors={self.n_neighbors} needs as many; give more normal images or a larger "
                "coreset_ratio."
            )
        bank = store.gather(device)
        if kept < len(bank):
            projection = self._rule("projection")
            index = k_center(
                bank,
                kept,
                start=self._rule("start"),
                projection=None if projection == "none" else projection,
                seed=self.seed,
            )
            bank = bank[index]
        return {"bank": bank, "n_channels": torch.tensor(d, device=device)}

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != {"bank", "n_channels"}:
            raise ArtifactError(f"a {self.name} holds bank and n_channels; this holds {sorted(state)}")
        bank, d, k = state["bank"], state["n_channels"], self.n_neighbors
        if bank.dim() != 2 or bank.dtype != torch.float32 or d.shape != () or d.dtype != torch.int64:
            raise ArtifactError(
                f"a {self.name} must hold a float32 bank (M, D) and an int64 number of channels, this holds "
                f"{bank.dtype} {tuple(bank.shape)} and {d.dtype} {tuple(d.shape)}"
            )
        most = self._rule("max_channels") or math.inf
        if bank.shape[0] < k or not 1 <= bank.shape[1] == min(int(d), most):
            raise ArtifactError(
                f"a bank for n_neighbors={k} and features of D = {int(d)} must be (M, {min(int(d), most)}), "
                f"M >= {k}, this is {tuple(bank.shape)}"
            )

    def _patch_scores(self, features: Features) -> Tensor:
        return self._search(features.tensor)[0]

    def _scores(self, features: Features) -> Scores:
        patches, pooled, nearest = self._search(features.tensor)
        found = self._summarize(patches, features.image_size)
        b = min(self._rule("n_reweight"), len(self.bank))
        if b == 1 or len(features) == 0:
            return found
        worst = patches.flatten(1).argmax(dim=1, keepdim=True)
        center = self.bank[nearest.flatten(1).gather(1, worst)[:, 0]]
        query = pooled.flatten(1, 2).gather(1, worst[..., None].expand(-1, -1, pooled.shape[3]))
        around = self.bank[knn_topk(center, self.bank, b, "euclidean")[1]]
        distance = (query - around).norm(dim=2)
        own = (query[:, 0] - center).norm(dim=1)
        weight = 1 - (own - distance.logsumexp(dim=1)).exp()
        return Scores(weight * found.score, found.map)

    def _search(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give patch scores (B, h, w), what was searched for (B, h, w, D), and the nearest rows (B, h, w)."""
        pooled, metric = self._pool(tensor), self._metric_searched
        distance, index = knn_topk(pooled.flatten(0, 2), self._searched(metric), self.n_neighbors, metric)
        grid = tensor.shape[:3]
        return distance.mean(dim=1).view(grid), pooled, index[:, 0].view(grid)

    def _summarize(self, patches: Tensor, image_size: tuple[int, int]) -> Scores:
        mode, boundary = self._rule("upsampling"), COMPAT[self.compat]["boundary"]
        return Scores(
            patches.amax(dim=(1, 2)), upsample_blur(patches, image_size, self.sigma, mode, boundary)
        )

    @property
    def _metric_searched(self) -> str:
        metric: str = self._rule("metric")
        return metric

    def _rule(self, option: str) -> Any:
        """Give an argument, or what `compat` says where it is None."""
        given = getattr(self, option)
        return COMPAT[self.compat][option] if given is None else given

    def _pool(self, tensor: Tensor) -> Tensor:
        """Average neighborhoods, then channels where they are too many; gives (B, h, w, D) float32."""
        tensor = tensor.float()
        if self.neighborhood > 1 and len(tensor):
            side, zeros = self.neighborhood, self.border == "zeros"
            planes = tensor.movedim(3, 1)
            planes = avg_pool2d(planes, side, stride=1, padding=side // 2, count_include_pad=zeros)
            tensor = planes.movedim(1, 3).contiguous()
        most = self._rule("max_channels")
        if not 0 < most < tensor.shape[3]:
            return tensor
        return adaptive_avg_pool1d(tensor.flatten(0, 2), most).view(*tensor.shape[:3], most)
