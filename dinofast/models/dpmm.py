"""The Dirichlet-process mixture: what normal patches look like, in as many components as they need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from dinofast.errors import ArtifactError
from dinofast.interop import takes_features
from dinofast.models import mixture_start
from dinofast.models.base import checked_stream
from dinofast.models.feature_store import FeatureStore
from dinofast.models.iterative import Checkpoint, IterativeModel
from dinofast.models.mixture import FLOAT32_FLOOR, Mixture, Rule, check_tensors, step
from dinofast.models.mixture_scores import (
    DISTANCES,
    SCORINGS,
    Active,
    ActiveOfState,
    active,
    log_likelihood,
    most_likely,
    score_rows,
)
from dinofast.models.params import check_choice, check_number, check_seed, check_whole
from dinofast.models.tokens import prepared_tokens
from dinofast.types import Features

if TYPE_CHECKING:
    from typing_extensions import Self

    from dinofast.progress import Progress

COVARIANCE_TYPES = ("diag", "spherical", "full")
COMPATS = ("paper", "anomalydino-dpmm")


class DPMM(IterativeModel):
    """Learn a Dirichlet-process mixture of Gaussians of normal patches; score by the nearest component.

    A batch of n patches y_i makes one step. E: r_ik is proportional to π_k N(y_i | μ_k, Σ_k). M: with step
    size γ, p_k ← (1−γ) p_k + γ Σ_i r_ik / n, and likewise m_k of r_ik y_i and C_k of r_ik y_i y_iᵀ. Then
    μ_k = m_k / (p_k + ε), Σ_k = C_k / (p_k + ε) − μ_k μ_kᵀ + `reg_covar`, and with T_k = Σ_{j>k} p_j

        v_k = p_k / (p_k + (α−1)/n + T_k + ε),    π_k = v_k Π_{j<k} (1 − v_j),
        α ← max(1, (K−1) / Σ_{k<K} [ψ(n (p_k + T_k) + α + 1) − ψ(n T_k + α)]),

    both with the old α. Three published equations read otherwise and cannot be meant: 5 divides m_k by
    Σ_j p_j, which gives no mean; 6 adds α − 1 to the shares p_k instead of the counts n p_k, which leaves
    nearly all weight to the last stick; 10 calls the number of sticks N, elsewhere the patches of a batch.
    The published code computes what stands above, though its α may fall below 1, where v_k exceeds 1.

    Image score: the mean of the top 1 % of the patch scores, as `MemoryBank` has it; none is published. Map:
    patch scores brought to pixels bilinearly, not blurred.

    Args:
        n_components: K, the most components there can be.
        covariance_type: "diag", "spherical" or "full". The published runs with "full" have `reg_covar` 1e-3.
        schedule: "ema": γ is `update_rate`, in the first step too. "exp": γ is t^(−`update_rate`) in step t.
            None: γ is 1, nothing of earlier batches is remembered.
        update_rate: in (0, 1].
        weight_concentration: α at the start, at least 1.
        learn_concentration: whether α is learned.
        init: "k-means++": means are drawn from a sample of 20 · K patches, or all of fewer, each with
            a probability that grows with its distance to those before, and weights are their shares.
            "first-rows", the published code's: the first K patches of the first batch in random order, which
            lie in one image, and sticks drawn from Beta(1, α). Both start from the variance of what they draw
            from, plus `reg_covar`.
        n_epochs: times that every image is seen; may be fewer with `patience`.
        batch_size: images a step; the last batch of an epoch may have fewer.
        patience: epochs without a better validation before `fit` stops; None goes on to the end.
        scoring: a patch's score. "cosine": 1 − the best cosine to a mean, in [0, 2]. "euclidean": distance to
            the nearest mean. "mahalanobis": the smallest ((y−μ_k)ᵀ Σ_k⁻¹ (y−μ_k))^½. "likelihood": −ln of the
            largest N(y | μ_k, Σ_k). "mixture": −ln Σ_k π_k N(y | μ_k, Σ_k); these two may be negative.
        weight_threshold: components with π_k at most this take no part in scores and validation.
        normalize: scale every token to unit L2 norm first; a zero token stays zero.
        resample: side of the grid that tokens are then brought to, bilinearly without antialiasing; so are
            the results of `patch_scores`. The published code has 32. None keeps the grid.
        reg_covar: added to variances, at least 0; without it equal patches have no density.
        eps: ε, above 0.
        compat: where paper and code differ. "paper": v_K is 1 always, so the weights sum to 1; a last
            component of mass at most ε takes no part in scores. "anomalydino-dpmm": v_K follows the rule
            above, so they sum to a little less, and only for the three distances are they scaled to 1 before
            `weight_threshold` is applied; a weight that is 0 in float32 removes its component in training.
            With init="first-rows" and resample=32 that is the published code.
        seed: of the start and of the order of the images.

    Two patches of a batch may be equal, and K may exceed N: components without patches fade out and
    stay finite. `partial_fit` makes one step. Beyond one batch and its statistics, memory holds four K × D
    arrays, 16 · K · D bytes, and twice that with validation; with "full" two of them are K × D × D. Scores
    by densities keep what they are computed from in float64: 16 · K · D bytes, with "full" 8 · K · D² more.

    Raises:
        InputError: a parameter out of range.

    References:
        Schulthess and Konukoglu, "Anomaly detection by clustering DINO embeddings using a Dirichlet process
        mixture", MICCAI 2025, arXiv 2509.19997.

    >>> normal = Features(torch.randn(4, 8, 8, 16), None, (32, 32))
    >>> mixture = DPMM(n_components=10, n_epochs=2).fit([normal])
    >>> tuple(mixture.score(normal).map.shape), tuple(mixture.assign(normal).shape), mixture.n_iter_
    ((4, 32, 32), (4, 8, 8), 2)
    """

    name: ClassVar[str] = "dpmm"
    checkpoint_steps: ClassVar[int] = 50
    """Steps after which `fit` writes its checkpoint; it also does so after every epoch."""

    def __init__(
        self,
        n_components: int = 500,
        covariance_type: str = "diag",
        schedule: str | None = "ema",
        update_rate: float = 0.2,
        weight_concentration: float = 2.0,
        learn_concentration: bool = True,
        init: str = "k-means++",
        n_epochs: int = 40,
        batch_size: int = 12,
        patience: int | None = None,
        scoring: str = "cosine",
        weight_threshold: float = 1e-6,
        normalize: bool = True,
        resample: int | None = None,
        reg_covar: float = 1e-6,
        eps: float = torch.finfo(torch.float32).eps,
        compat: str = "paper",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice(COVARIANCE_TYPES, covariance_type=covariance_type)
        check_choice(mixture_start.INITS, init=init)
        check_choice(SCORINGS, scoring=scoring)
        check_choice(COMPATS, compat=compat)
        check_whole(1, n_components=n_components, n_epochs=n_epochs, batch_size=batch_size)
        check_whole(1, or_none=True, patience=patience, resample=resample)
        check_seed(seed)
        check_number("at least 1", lambda v: v >= 1, weight_concentration=weight_concentration)
        check_number("in [0, 1)", lambda v: 0 <= v < 1, weight_threshold=weight_threshold)
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.schedule = schedule
        self.update_rate = update_rate
        self.weight_concentration = weight_concentration
        self.learn_concentration = learn_concentration
        self.init = init
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.patience = patience
        self.scoring = scoring
        self.weight_threshold = weight_threshold
        self.normalize = normalize
        self.resample = resample
        self.reg_covar = reg_covar
        self.eps = eps
        self.compat = compat
        self.seed = seed
        published = compat == "anomalydino-dpmm"
        self._rule = Rule(
            spherical=covariance_type == "spherical",
            schedule=schedule,
            update_rate=update_rate,
            learn_concentration=learn_concentration,
            eps=eps,
            reg_covar=reg_covar,
            closed=not published,
            floor=FLOAT32_FLOOR if published else -math.inf,
        )
        self._start = partial(
            mixture_start.start,
            n_components=n_components,
            init=init,
            concentration=weight_concentration,
            reg_covar=reg_covar,
            full=covariance_type == "full",
            seed=seed,
        )
        self._active = ActiveOfState()

    @property
    def weights_(self) -> Tensor:
        """Weights π (K,), float64, in [0, 1]; see `compat` for their sum."""
        return self._rule.log_weights(self.state()["sticks"]).exp()

    @property
    def means_(self) -> Tensor:
        """Means μ (K, D), float32."""
        return self.state()["means"]

    @property
    def covariances_(self) -> Tensor:
        """Variances (K, D), (K,) for "spherical", or covariances (K, D, D) for "full"; float32."""
        covariances = self.state()["covariances"]
        return covariances[:, 0] if self.covariance_type == "spherical" else covariances

    @property
    def weight_concentration_(self) -> float:
        """α, at least 1."""
        return float(self.state()["concentration"])

    @property
    def n_iter_(self) -> int:
        """Steps made."""
        return int(self.state()["iteration"])

    @property
    def lower_bound_(self) -> float:
        """Mean ln p of a patch, in nats.

        Of the validation images under the state that was kept; without them, of the images of the last epoch,
        or of the last `partial_fit`, each under the state before its step.
        """
        return float(self.state()["lower_bound"])

    @property
    def n_channels(self) -> int:
        """D of the features that the model was fitted on."""
        return self.means_.shape[1]

    @takes_features
    @torch.no_grad()
    def partial_fit(self, features: Features) -> Self:
        """Make one step on one batch of normal images; the first call starts from this batch.

        Args:
            features: see `fit`; at least one image.

        Returns:
            The model itself. When an error is raised, the model is as it was.

        Raises:
            InputError: see `fit`; D or device differ from the model's.
        """
        for batch in checked_stream([features]):
            if self.is_fitted:
                self._check_queries(batch)
            rows = self._prepared(batch.tensor).flatten(0, 2)
            mixture = Mixture.of(self._state) if self.is_fitted else self._start(rows)
            mixture, found = step(mixture, rows, self._rule)
            self._state = _state_of(mixture, found.double().mean())
        return self

    @takes_features
    @torch.no_grad()
    def score_samples(self, features: Features) -> Tensor:
        """Give ln p of every patch under the mixture, in nats; here higher is more normal.

        Args:
            features: see `patch_scores`.

        Returns:
            (B, h, w), float32.

        Raises:
            InputError: see `patch_scores`.
        """
        self._check_queries(features)
        return self._by_patch(features.tensor, log_likelihood)

    @takes_features
    @torch.no_grad()
    def assign(self, features: Features, *, pixels: bool = False) -> Tensor:
        """Tell which component every patch most likely belongs to.

        Args:
            features: see `patch_scores`.
            pixels: give the component of the patch under each pixel, at `features.image_size`.

        Returns:
            (B, h, w) or (B, H, W), int64, in [0, K): the largest r_ik among the components that take part in
            the score "mixture", the smallest index among equals.

        Raises:
            InputError: see `patch_scores`.
        """
        self._check_queries(features)
        labels = self._by_patch(features.tensor, most_likely)
        if not pixels:
            return labels
        (_, h, w), (height, width) = labels.shape, features.image_size
        down = torch.arange(height, device=labels.device) * h // height
        across = torch.arange(width, device=labels.device) * w // width
        return labels[:, down[:, None], across]

    def _stored(self, features: Iterable[Features], n_channels: int | None = None) -> FeatureStore:
        """Store tokens as they are trained on, so that an epoch only reads them."""
        prepared = (replace(b, tensor=self._prepared(b.tensor)) for b in checked_stream(features))
        return FeatureStore.of(prepared, n_channels)

    def _train(
        self, train: FeatureStore, validation: FeatureStore | None, checkpoint: Checkpoint, progress: Progress
    ) -> dict[str, Tensor]:
        tensors, position = checkpoint.load() or ({}, {"epoch": 0, "step": 0, "stale": 0})
        tensors = {name: tensor.to(train.device) for name, tensor in tensors.items()}
        best = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("best_")}
        if tensors:
            mixture, total = Mixture.of(tensors), tensors["lower_bound"]
        else:
            if self.init == "first-rows":
                rows = train.rows(next(train.batches(self.batch_size, self._shuffle(0))))
            else:
                rows = train.sample(mixture_start.SAMPLE * self.n_components, self.seed)
            mixture = self._start(rows)
            total = torch.zeros_like(mixture.concentration)
        start, stale = position["step"], position["stale"]
        steps = math.ceil(len(train) / self.batch_size)

        def save(epoch: int, done: int) -> None:
            kept = {f"best_{name}": tensor for name, tensor in best.items()}
            checkpoint.save(_state_of(mixture, total) | kept, {"epoch": epoch, "step": done, "stale": stale})

        for epoch in range(position["epoch"], self.n_epochs):
            if self.patience is not None and stale >= self.patience:
                break
            dealt = train.batches(self.batch_size, self._shuffle(epoch))
            for done, images in enumerate(islice(dealt, start, None), start + 1):
                mixture, found = step(mixture, train.rows(images), self._rule)
                total = total + found.double().sum()
                progress("train", epoch * steps + done, self.n_epochs * steps)
                if done % self.checkpoint_steps == 0 and done < steps:
                    save(epoch, done)
            bound = total / train.n_rows if validation is None else self._validate(mixture, validation)
            better = validation is None or not best or bool(bound > best["lower_bound"])
            stale = 0 if better else stale + 1
            if better:
                best = {name: tensor.clone() for name, tensor in _state_of(mixture, bound).items()}
            start, total = 0, torch.zeros_like(total)
            save(epoch + 1, 0)
        return best

    def _validate(self, mixture: Mixture, images: FeatureStore) -> Tensor:
        """Give the mean over images of the mean ln p of their patches, batch by batch; (), float64."""
        parts = active(mixture, self._rule, self.weight_threshold, rescaled=False)
        batches = images.batches(self.batch_size)
        means = [log_likelihood(images.rows(b), parts).double().mean() * len(b) for b in batches]
        return torch.stack(means).sum() / len(images)

    def _prepared(self, tensor: Tensor) -> Tensor:
        return prepared_tokens(tensor, normalize=self.normalize, resample=self.resample)

    def to(self, device: str | torch.device) -> Self:
        """Move what was learned, and what scores prepared from it, to a device, in place."""
        self._active.follow(self._state, super().to(device)._state, device)
        return self

    def prepared_bytes(self, device: str) -> int:
        """Count the active components and what densities are computed from."""
        return self._parts(self._rescaled).nbytes

    @property
    def _rescaled(self) -> bool:
        return self.compat == "anomalydino-dpmm" and self.scoring in DISTANCES

    def _patch_scores(self, features: Features) -> Tensor:
        return self._by_patch(features.tensor, partial(score_rows, scoring=self.scoring), self._rescaled)

    def _by_patch(
        self, tensor: Tensor, ask: Callable[[Tensor, Active], Tensor], rescaled: bool = False
    ) -> Tensor:
        tokens = self._prepared(tensor)
        return ask(tokens.flatten(0, 2), self._parts(rescaled)).view(tokens.shape[:3])

    def _parts(self, rescaled: bool) -> Active:
        return self._active.of(self._state, self._rule, self.weight_threshold, rescaled)

    def _shuffle(self, epoch: int) -> int:
        return ((self.seed << 20) + epoch + 1) % 2**63

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        check_tensors(state, self.n_components, full=self.covariance_type == "full")
        bound = state.get("lower_bound")
        if bound is None or bound.shape != () or bound.dtype != torch.float64:
            raise ArtifactError("a fitted mixture also holds lower_bound, a float64 number")


def _state_of(mixture: Mixture, lower_bound: Tensor) -> dict[str, Tensor]:
    return mixture.tensors() | {"lower_bound": lower_bound}
