"""Support images: a query is compared with the normal image most like it, by that image's few prototypes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from dinofast.errors import ArtifactError, InputError
from dinofast.interop import takes_features
from dinofast.models.base import Model
from dinofast.models.foreground import RULES, check_intensity, foreground_by
from dinofast.models.image_score import top_percent
from dinofast.models.kmeans import check_arguments, kmeans
from dinofast.models.params import check_number, check_seed
from dinofast.models.similarity import AGGREGATES, aggregated, extremes, seen
from dinofast.models.tokens import check_class_tokens, class_tokens
from dinofast.ops import knn_topk, upsample_blur
from dinofast.ops.rows import normalize_rows
from dinofast.ops.upsample_blur import MODES
from dinofast.types import Features, Scores

MATCH_DESCRIPTORS = ("cls", "mean_patch", "mean_foreground_patch")
NORMALIZATIONS = ("none", "image", "dataset")
IMAGE_SCORES = ("top-percent", "max")
COMPAT: dict[str | None, dict[str, str]] = {
    None: {"aggregate": "max", "normalize": "none"},
    "reported": {"aggregate": "mean", "normalize": "image"},
}
"""What `compat` decides where `aggregate` and `normalize` are None."""
_ROUNDING = 1e-6
_LOG = logging.getLogger("dinofast.models")


class SupportKMeans(Model):
    """Keep a few prototypes of every normal image; score a query by those of the image most like it.

    The method of DINO-AD. `fit` describes each normal image by one vector and groups the unit patch vectors
    of its foreground into K prototypes, scaled to unit length. A query takes the `n_support` normal images
    whose vectors have the largest cosine with its own; a patch's similarity u to their prototypes gives its
    score 1 − u.

    What is published: a frozen DINOv3, a normal image chosen by the similarity of embeddings, k-means on its
    foreground, cosine similarity. K = 2, the mean over the prototypes and the min-max normalization are
    reported by a third party only. Everything else was not found, so every step is an argument here, and no
    default is the paper's choice.

    Args:
        n_clusters: K, prototypes of a normal image, at least 1; 2 is reported. An image with fewer foreground
            patches has these as its prototypes.
        n_support: normal images that a query is compared with, at least 1; prototypes of several are pooled.
        match_descriptor: the vector of an image: "cls", its class token; "mean_patch", the mean of its unit
            patch vectors; "mean_foreground_patch", of those on the foreground, of all where there are none.
        foreground: which patches show the object: "intensity", mean gray above `intensity_threshold`, for
            scans on black; "otsu", mean gray above Otsu's threshold of the image; "pca", `foreground_mask` of
            the patch features on the grid; "none", all.
        intensity_threshold: of "intensity", in [0, 1).
        mask_threshold: of "pca", in the units of the backbone's tokens. A `Detector` fills in 10.0 when its
            backbone is a DINOv2.
        aggregate: u is the largest ("max") or the mean ("mean") of the cosines with the prototypes. None
            follows `compat`.
        normalize: "none": score 1 − u, in [0, 2]. "image": 1 − (u − min) / (max − min) over the foreground
            of the query, so that every image, a healthy one too, has a patch of score 1. "dataset": the same
            with min and max over all foreground patches of the normal images, each against its own
            prototypes; not confined to [0, 1]. A range below 1e-6 is rounding and is not stretched. None
            follows `compat`.
        mask_query_background: give patches of the query that are no foreground the score of u = 1, the
            smallest there is ("image": 0). None: unless `foreground` is "none".
        init: start of the k-means, "k-means++" or "random-rows".
        n_init: starts of which the best is kept, at least 1.
        n_iter: most iterations of the k-means, at least 1.
        tol: it ends when no center moves farther.
        distance: "euclidean" between unit vectors, or "cosine", which scales centers in every iteration.
        upsampling: of the map, "bilinear" or "nearest".
        sigma: standard deviation of the Gaussian over the map, in pixels; 0 does not blur.
        image_score: "top-percent", the mean of the largest percent of the patch scores, background included;
            or "max".
        compat: None: `aggregate` "max", `normalize` "none". "reported": "mean" and "image", what is reported
            of the paper's method.
        seed: of the k-means; the same for every image, so that an image has the same prototypes anywhere.

    "intensity" and "otsu" need `Features.intensity`, which a `Detector` fills in. Normal images without any
    foreground are left out, with a warning. What is learned takes 4 · J · (E + K · D) bytes for J normal
    images with vectors of E channels; `fit` holds that and one batch. The order of images decides nothing.

    Raises:
        InputError: a parameter out of range.

    References:
        Huo, Hong and Chen, "DINO-AD", arXiv 2602.03870.

    >>> normal = Features(torch.randn(4, 8, 8, 16), None, (32, 32))
    >>> model = SupportKMeans(match_descriptor="mean_patch", foreground="none").fit([normal])
    >>> model.match(normal).flatten().tolist(), model.score(normal).map.shape
    ([0, 1, 2, 3], torch.Size([4, 32, 32]))
    """

    name: ClassVar[str] = "support_kmeans"

    def __init__(
        self,
        n_clusters: int = 2,
        n_support: int = 1,
        match_descriptor: str = "cls",
        foreground: str = "intensity",
        intensity_threshold: float = 0.02,
        mask_threshold: float | None = None,
        aggregate: str | None = None,
        normalize: str | None = None,
        mask_query_background: bool | None = None,
        init: str = "k-means++",
        n_init: int = 1,
        n_iter: int = 50,
        tol: float = 1e-6,
        distance: str = "euclidean",
        upsampling: str = "bilinear",
        sigma: float = 0.0,
        image_score: str = "top-percent",
        compat: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_seed(seed)
        check_arguments(n_clusters, init, n_init, n_iter, tol, distance)
        if not isinstance(n_support, int) or n_support < 1:
            raise InputError(f"n_support must be a whole number, at least 1, got {n_support!r}")
        check_number("in [0, 1)", lambda v: 0 <= v < 1, intensity_threshold=intensity_threshold)
        check_number("at least 0", lambda v: v >= 0, sigma=sigma)
        for option, value, known in (
            ("compat", compat, tuple(COMPAT)),
            ("match_descriptor", match_descriptor, MATCH_DESCRIPTORS),
            ("foreground", foreground, RULES),
            ("aggregate", aggregate, (None, *AGGREGATES)),
            ("normalize", normalize, (None, *NORMALIZATIONS)),
            ("upsampling", upsampling, MODES),
            ("image_score", image_score, IMAGE_SCORES),
        ):
            if value not in known:
                raise InputError(f"unknown {option} {value!r}; one of {', '.join(map(str, known))}")
        if mask_query_background and foreground == "none":
            raise InputError("mask_query_background=True needs a foreground rule, foreground is 'none'")
        self.n_clusters = n_clusters
        self.n_support = n_support
        self.match_descriptor = match_descriptor
        self.foreground = foreground
        self.intensity_threshold = intensity_threshold
        self.mask_threshold = mask_threshold
        self.aggregate = aggregate
        self.normalize = normalize
        self.mask_query_background = mask_query_background
        self.init = init
        self.n_init = n_init
        self.n_iter = n_iter
        self.tol = tol
        self.distance = distance
        self.upsampling = upsampling
        self.sigma = sigma
        self.image_score = image_score
        self.compat = compat
        self.seed = seed

    @property
    def wants_intensity(self) -> bool:
        """Whether the foreground rule looks at the gray of the patches."""
        return self.foreground in ("intensity", "otsu")

    @property
    def wants_cls(self) -> bool:
        """Whether images are matched by their class tokens."""
        return self.match_descriptor == "cls"

    @property
    def masking(self) -> bool:
        """Whether `mask_threshold` is needed."""
        return self.foreground == "pca"

    @property
    def n_channels(self) -> int:
        """D of the features that the model was fitted on."""
        return self.state()["centroids"].shape[2]

    @property
    def n_images(self) -> int:
        """J, the normal images that queries are compared with; those without foreground are not among them.

        Raises:
            InputError: the model is not fitted.
        """
        return self.state()["descriptors"].shape[0]

    @takes_features
    @torch.no_grad()
    def match(self, features: Features) -> Tensor:
        """Find the normal images most like each query, in one search.

        Args:
            features: see `patch_scores`.

        Returns:
            (B, n_support), int64, in [0, J), the most similar first, the smaller number among equals: numbers
            of the normal images in the order of the fit, those without foreground not counted.

        Raises:
            InputError: see `patch_scores`.
        """
        self._check_queries(features)
        if len(features) == 0:
            return torch.zeros(0, self.n_support, dtype=torch.int64, device=self.device)
        unit, mask = normalize_rows(features.tensor), self._foreground(features)
        return self._match(self._descriptors(features, unit, mask))

    def waits_for(self) -> str | None:
        """Tell that principal components are found by the host, see `Model.waits_for`."""
        if self.foreground != "pca":
            return None
        return "foreground='pca' takes principal components; choose foreground='intensity', 'otsu' or 'none'"

    def _check_queries(self, features: Features) -> None:
        super()._check_queries(features)
        if len(features):
            self._check_values(features)

    def _check_class_tokens(self, features: Features) -> None:
        """Do nothing: `_check_queries` looks at them, as patches are scored by them too."""

    def _check_values(self, features: Features) -> None:
        """Raise InputError for class tokens or intensities that cannot be used."""
        if self.match_descriptor == "cls":
            check_class_tokens(features)
        if self.wants_intensity:
            check_intensity(self.foreground, features)

    def _learn(self, features: Iterator[Features]) -> dict[str, Tensor]:
        descriptors: list[Tensor] = []
        centroids, counts, ranges, blank = [], [], [], 0
        for batch in features:
            self._check_values(batch)
            unit, mask = normalize_rows(batch.tensor), self._foreground(batch)
            vectors = self._descriptors(batch, unit, mask)
            if descriptors and descriptors[-1].shape != vectors.shape[1:]:
                raise InputError(
                    f"class tokens differ between batches, {len(descriptors[-1])} and {vectors.shape[1]} "
                    "channels; use one backbone and one set of layers."
                )
            for image, vector in enumerate(vectors):
                rows = unit[image].flatten(0, 1) if mask is None else unit[image][mask[image]]
                if len(rows) == 0:
                    blank += 1
                    continue
                found = self._prototypes(rows)
                own = aggregated(rows, found, None, self._aggregate())
                descriptors.append(vector.clone())
                centroids.append(found.new_zeros(self.n_clusters, found.shape[1]))
                centroids[-1][: len(found)] = found
                counts.append(len(found))
                ranges.append(torch.stack([own.min(), own.max()]))
        self._check_pool(len(counts), blank)
        return {
            "descriptors": torch.stack(descriptors),
            "centroids": torch.stack(centroids),
            "n_centroids": torch.tensor(counts, device=centroids[0].device),
            "similarity_range": torch.stack(ranges),
        }

    def _check_pool(self, kept: int, blank: int) -> None:
        found = f"{blank} of {kept + blank} normal images have no foreground by the rule {self.foreground!r}"
        remedy = "choose another rule or threshold, or foreground='none'"
        if kept == 0:
            raise InputError(f"{found}; {remedy}.")
        if kept < self.n_support:
            why = f"{found}; {remedy}" if blank else "give more normal images"
            raise InputError(
                f"n_support={self.n_support} needs as many normal images, {kept} are left: {why}."
            )
        if blank:
            _LOG.warning("%s and are left out", found)

    def _prototypes(self, rows: Tensor) -> Tensor:
        """Group the unit foreground patches (N, D) of one image; gives (min(K, N), D) of unit length."""
        found = kmeans(
            rows,
            self.n_clusters,
            init=self.init,
            n_init=self.n_init,
            n_iter=self.n_iter,
            tol=self.tol,
            distance=self.distance,
            seed=self.seed,
        )
        return normalize_rows(found.centers)

    def _merged(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ours = self.state()
        if ours["descriptors"].shape[1] != other["descriptors"].shape[1]:
            raise InputError("cannot merge models whose class tokens have different numbers of channels")
        return {name: torch.cat([tensor, other[name]]) for name, tensor in ours.items()}

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        names = {"descriptors", "centroids", "n_centroids", "similarity_range"}
        if set(state) != names:
            raise ArtifactError(f"a {self.name} holds {sorted(names)}; this holds {sorted(state)}")
        vectors, centroids, counts = (state[n] for n in ("descriptors", "centroids", "n_centroids"))
        j = len(vectors) if vectors.dim() else 0
        fits = (
            j >= self.n_support
            and vectors.dim() == 2
            and centroids.dim() == 3
            and centroids.shape[:2] == (j, self.n_clusters)
            and counts.shape == (j,)
            and counts.dtype == torch.int64
            and state["similarity_range"].shape == (j, 2)
            and all(state[n].dtype == torch.float32 for n in names - {"n_centroids"})
        )
        if not fits or not 1 <= counts.min() <= counts.max() <= self.n_clusters:
            shapes = {n: f"{state[n].dtype} {tuple(state[n].shape)}" for n in sorted(names)}
            raise ArtifactError(
                f"a {self.name} with n_clusters={self.n_clusters} and n_support={self.n_support} must hold "
                f"float32 (J, E), (J, K, D), int64 (J,) in [1, K] and float32 (J, 2), this holds {shapes}"
            )

    def _patch_scores(self, features: Features) -> Tensor:
        tensor, state = features.tensor, self.state()
        if len(features) == 0:
            return torch.zeros(tensor.shape[:3], device=tensor.device)
        unit, mask = normalize_rows(tensor), self._foreground(features)
        index = self._match(self._descriptors(features, unit, mask))
        centroids = state["centroids"][index].flatten(1, 2)
        slots = torch.arange(self.n_clusters, device=tensor.device)
        real = (slots < state["n_centroids"][index][..., None]).flatten(1)
        similarity = aggregated(unit.flatten(1, 2), centroids, real[:, None], self._aggregate())
        similarity = similarity.view(tensor.shape[:3])
        low, high = self._range(similarity, mask)
        span = torch.where(high - low > _ROUNDING, high - low, 1)
        scores = (high - similarity) / span
        if mask is None or self.mask_query_background is False:
            return scores
        least = torch.zeros_like(high) if self._normalize() == "image" else (high - 1) / span
        return torch.where(mask, scores, least)

    def _summarize(self, patches: Tensor, image_size: tuple[int, int]) -> Scores:
        pixels = upsample_blur(patches, image_size, self.sigma, self.upsampling)
        score = top_percent(patches) if self.image_score == "top-percent" else patches.amax(dim=(1, 2))
        return Scores(score, pixels)

    def _aggregate(self) -> str:
        return self.aggregate or COMPAT[self.compat]["aggregate"]

    def _normalize(self) -> str:
        return self.normalize or COMPAT[self.compat]["normalize"]

    def _range(self, similarity: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Give the similarities that become score 1 and 0, broadcasting to (B, h, w)."""
        if self._normalize() == "none":
            return similarity.new_zeros(()), similarity.new_ones(())
        if self._normalize() == "dataset":
            ends = self.state()["similarity_range"]
            return ends[:, 0].min(), ends[:, 1].max()
        return extremes(similarity, mask)

    def _match(self, vectors: Tensor) -> Tensor:
        """Search the pool for all queries (B, E) at once; gives (B, n_support)."""
        pool = self.state()["descriptors"]
        if vectors.shape[1] != pool.shape[1]:
            raise InputError(
                f"class tokens have {vectors.shape[1]} channels, those of the fit {pool.shape[1]}; "
                "use the backbone and layers of the fit."
            )
        return knn_topk(vectors, pool, self.n_support)[1]

    def _descriptors(self, features: Features, unit: Tensor, mask: Tensor | None) -> Tensor:
        """Describe every image by one vector; gives (B, E), float32, of unit length."""
        if self.match_descriptor == "cls":
            return normalize_rows(class_tokens(features))
        if mask is None or self.match_descriptor == "mean_patch":
            return normalize_rows(unit.mean(dim=(1, 2)))
        return normalize_rows((unit * seen(mask)[..., None]).sum(dim=(1, 2)))

    def _foreground(self, features: Features) -> Tensor | None:
        """Give (B, h, w) bool, True where a patch shows the object; None where all do."""
        return foreground_by(self.foreground, features, self.intensity_threshold, self.mask_threshold)
