"""What every model is: learns from normal features, stream-wise, then scores features; higher is abnormal.

A subclass stores its constructor arguments unchanged under their own names and writes `_learn`,
`_check_state`, `_patch_scores`, `n_channels` and, where it merges, `_merged`. It replaces `_summarize` where
patch scores are summarized in another way, and `_scores` where images take more than these. What it learns is
a dictionary of tensors, replaced as a whole and only when complete: a failed fit changes nothing.
"""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dinofast import artifact
from dinofast.errors import ArtifactError, InputError
from dinofast.interop import TensorBatches, takes_features
from dinofast.models.image_score import top_percent
from dinofast.models.tokens import check_finite_cls
from dinofast.ops import upsample_blur
from dinofast.types import Features, Scores

if TYPE_CHECKING:
    from typing_extensions import Self


class Model(ABC):
    """Base of all models."""

    name: ClassVar[str]
    """The name that `dinofast.models.create` knows."""
    merges: ClassVar[bool] = True
    """Whether models of parts can be merged into the model of the whole."""
    order_free: ClassVar[bool] = True
    """Whether the order of the images leaves scores as they are, but for rounding."""

    learns_from_masks: ClassVar[bool] = False
    """Whether `fit` needs `Features.masks`, of abnormal images too."""

    def __init__(self) -> None:
        self._state: dict[str, Tensor] = {}

    @property
    def wants_intensity(self) -> bool:
        """Whether the model needs `Features.intensity`."""
        return False

    @property
    def wants_cls(self) -> bool:
        """Whether the model needs `Features.cls`."""
        return False

    @classmethod
    def param_names(cls) -> list[str]:
        """List the constructor's arguments in its order."""
        return list(inspect.signature(cls).parameters)

    def params(self) -> dict[str, Any]:
        """Give the constructor's arguments as they stand: name -> value."""
        return {name: getattr(self, name) for name in self.param_names()}

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self)).parameters
        shown = [f"{n}={v!r}" for n, v in self.params().items() if v != defaults[n].default]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def is_fitted(self) -> bool:
        """Whether the model has learned anything."""
        return bool(self._state)

    @property
    def device(self) -> torch.device:
        """Where the learned tensors lie, and where features to be scored must lie."""
        return next(iter(self.state().values())).device

    @torch.no_grad()
    def fit(self, features: Iterable[Features]) -> Self:
        """Learn from normal images, batch by batch; what was learned before is replaced.

        The batches are read once, in order, and never all held. The model lives on their device afterwards.

        Args:
            features: batches with tensors or other arrays (B, h, w, D), finite; grids and B may differ, D may
                not. Batches without images add nothing.

        Returns:
            The model itself. When an error is raised, the model is as it was.

        Raises:
            InputError: no images at all, NaN or infinite features, D differs, or what the model says.
        """
        with TensorBatches(features) as batches:
            self._state = self._learn(checked_stream(batches))
        return self

    @takes_features
    @torch.no_grad()
    def partial_fit(self, features: Features) -> Self:
        """Learn from one more batch of normal images, as if `fit` had got it behind the others.

        What was learned is copied; many batches go into one `fit` or are merged. A batch must hold as many
        images and patches as a model of its own needs.

        Args:
            features: see `fit`.

        Returns:
            The model itself. When an error is raised, the model is as it was.

        Raises:
            InputError: see `fit`; D differs from before, or a kind of model that learns all images at once.
        """
        if not self.merges:
            raise InputError(f"a {self.name} cannot learn more images later; fit it on all of them instead.")
        added = type(self)(**self.params()).fit([features])
        if self.is_fitted:
            return self.merge(added)
        self._state = added.state()
        return self

    @takes_features
    def patch_scores(self, features: Features) -> Tensor:
        """Score every patch.

        Args:
            features: tensor (B, h, w, D), finite, on the model's device; B may be 0.

        Returns:
            (B, h, w), float32, of the kind of `features.tensor`; higher is more abnormal.

        Raises:
            InputError: the model is not fitted, D or device differ from the fit's, NaN or infinite features.
        """
        self._check_queries(features)
        with torch.no_grad():
            return self._patch_scores(features)

    @takes_features
    def score(self, features: Features) -> Scores:
        """Score images and their pixels.

        Args:
            features: see `patch_scores`.

        Returns:
            Image scores (B,) and maps (B, H, W) at `features.image_size`, float32, of the kind of
            `features.tensor`; higher is more abnormal.

        Raises:
            InputError: see `patch_scores`.
        """
        self._check_queries(features)
        self._check_class_tokens(features)
        return self.score_unseen(features)

    @torch.no_grad()
    def score_unseen(self, features: Features) -> Scores:
        """Score features that `score` would take, without looking at their values first.

        Nothing waits for the device unless `waits_for` says so, so it can be recorded in a CUDA graph.
        Features that hold NaN or infinity give scores that mean nothing: count `broken_tokens` beside it.

        Args:
            features: as `score` accepts them.

        Returns:
            As `score`.
        """
        return self._scores(features)

    def waits_for(self) -> str | None:
        """Tell what makes scoring wait for values from the device, and what to choose instead.

        Returns:
            The reason in words, or None: the same kernels run whatever the features are.
        """
        return None

    @torch.no_grad()
    def merge(self, other: Self) -> Self:
        """Add what another model of the same parameters learned from other images, as if fitted on both.

        Args:
            other: stays as it is; may be on another device.

        Returns:
            The model itself, on its own device. When an error is raised, the model is as it was.

        Raises:
            InputError: another class, other parameters, another D, one of the two is not fitted, or a kind of
                model that does not merge.
        """
        if type(other) is not type(self):
            raise InputError(f"cannot merge a {type(other).__name__} into a {type(self).__name__}")
        theirs = other.params()
        differing = [f"{n} ({v!r} and {theirs[n]!r})" for n, v in self.params().items() if v != theirs[n]]
        if differing:
            raise InputError(f"cannot merge models with different parameters: {', '.join(differing)}")
        self.state()
        added = {name: tensor.to(self.device) for name, tensor in other.state().items()}
        if other.n_channels != self.n_channels:
            raise InputError(
                f"cannot merge models of different D, {self.n_channels} and {other.n_channels}; "
                "fit both with the same backbone and layers."
            )
        self._state = self._merged(added)
        return self

    def to(self, device: str | torch.device) -> Self:
        """Move what was learned to a device, in place."""
        self._state = {name: tensor.to(device) for name, tensor in self._state.items()}
        return self

    def prepared_bytes(self, device: str) -> int:
        """Tell what a fitted model makes for its searches and keeps beside its state.

        Args:
            device: "cpu" or "cuda", where it would score.
        """
        return 0

    def preparing_bytes(self, device: str) -> int:
        """Tell the most that it takes beside its state while that is made, what is kept included."""
        return self.prepared_bytes(device)

    def state(self) -> dict[str, Tensor]:
        """Give everything learned, name -> tensor, not copied.

        Raises:
            InputError: the model is not fitted.
        """
        if not self._state:
            raise InputError(f"this {self.name} is not fitted; call fit with normal images first.")
        return dict(self._state)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave; the tensors are not copied.

        They are the model's from then on and must not be changed: what it prepared from them (a bank that
        searches them faster) might not notice.

        Raises:
            ArtifactError: tensors missing, unknown, or of the wrong shape or dtype; the model is as it was.
        """
        self._check_state(state)
        self._state = dict(state)

    def config(self) -> dict[str, Any]:
        """Give the name and parameters as JSON values, for `dinofast.models.restore`."""
        return {"model": self.name, "params": self.params()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted model to a safetensors file; the same model gives the same bytes.

        Raises:
            InputError: the model is not fitted, or the file cannot be written.
        """
        artifact.write(path, "model", self.state(), self.config())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote, onto the CPU.

        Raises:
            InputError: no such file, or it cannot be opened.
            ArtifactError: torn, foreign or newer, or another kind of model.
        """
        from dinofast import models

        model = models.load(path)
        if not isinstance(model, cls):
            raise ArtifactError(f"{path}: holds a {model.name}, not a {cls.name}; use dinofast.models.load.")
        return model

    @property
    @abstractmethod
    def n_channels(self) -> int:
        """D of the features that the model was fitted on."""

    @abstractmethod
    def _learn(self, features: Iterator[Features]) -> dict[str, Tensor]:
        """Turn checked batches into a state; must not touch the present one."""

    def _merged(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Join the present state with another on the same device, where `merges`."""
        raise InputError(f"a {self.name} cannot be merged; fit one on all images instead.")

    @abstractmethod
    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise ArtifactError unless `state` could be this model's."""

    def _check_queries(self, features: Features) -> None:
        """Raise InputError for features that cannot be scored; see `patch_scores`."""
        self.state()
        check_features(features)
        tensor = features.tensor
        if tensor.device != self.device:
            raise InputError(
                f"{self.name} is on {self.device}, the features on {tensor.device}; move one of them, "
                f"for instance with model.to({str(tensor.device)!r})."
            )
        if tensor.shape[3] != self.n_channels:
            raise InputError(
                f"D differs: {self.name} was fitted on features with D = {self.n_channels}, these have D = "
                f"{tensor.shape[3]}; use the backbone and layers of the fit."
            )

    def _check_class_tokens(self, features: Features) -> None:
        """Raise InputError for NaN or infinite class tokens of a model that needs them."""
        if self.wants_cls and features.cls is not None:
            check_finite_cls(features.cls)

    def _scores(self, features: Features) -> Scores:
        """Score checked images; a model whose image score takes more than patch scores replaces this."""
        return self._summarize(self._patch_scores(features), features.image_size)

    @abstractmethod
    def _patch_scores(self, features: Features) -> Tensor:
        """Score the patches of checked features; gives (B, h, w) float32."""

    def _summarize(self, patches: Tensor, image_size: tuple[int, int]) -> Scores:
        """Turn patch scores (B, h, w) into image scores, of the largest percent, and maps without a blur."""
        return Scores(top_percent(patches), upsample_blur(patches, image_size, sigma=0.0))


def broken_tokens(features: Features) -> Tensor:
    """Count the patch and class tokens of each image that hold NaN or infinity; nothing waits for the device.

    Args:
        features: tensor (B, h, w, D), cls (B, D) or None.

    Returns:
        (B,), int64.
    """
    broken = (~features.tensor.isfinite().all(dim=3)).sum(dim=(1, 2))
    return broken if features.cls is None else broken + ~features.cls.isfinite().all(dim=1)


def check_features(features: Features) -> None:
    """Hold one batch to what every model needs.

    Raises:
        InputError: not Features, not (B, h, w, D) floating point, an empty grid, NaN or infinite as float32.
    """
    if not isinstance(features, Features):
        raise InputError(
            f"expected dinofast.Features, got {type(features).__name__}; give Features(array, None, (H, W))"
        )
    tensor = features.tensor
    if tensor.dim() != 4 or not tensor.is_floating_point():
        raise InputError(
            f"features must be a floating-point tensor (B, h, w, D), got {tensor.dtype} {tuple(tensor.shape)}"
        )
    if 0 in tensor.shape[1:]:
        raise InputError(f"features (B, h, w, D) = {tuple(tensor.shape)} hold no patches or no channels")
    if min(features.image_size) < 1:
        raise InputError(f"image_size must be (H, W), each at least 1, got {features.image_size}")
    finite = (tensor.float() if tensor.dtype == torch.float64 else tensor).isfinite()
    if not bool(finite.all()):
        bad = int((~finite.all(dim=3)).sum())
        raise InputError(
            f"{bad} of {tensor.shape[:3].numel()} patches hold NaN or infinite features; look for NaN in the "
            "images, and run the backbone in float32 or bfloat16 if it ran in float16."
        )


def checked_stream(features: Iterable[Features]) -> Iterator[Features]:
    """Pass on the batches that hold images, each checked, all of one D.

    Raises:
        InputError: see `check_features`; D differs between batches; no images at all.
    """
    channels = 0
    for batch in features:
        check_features(batch)
        if len(batch) == 0:
            continue
        d = batch.tensor.shape[3]
        if channels not in (0, d):
            raise InputError(
                f"D differs between batches, {channels} and {d}; use one backbone and one set of layers."
            )
        channels = d
        yield batch
    if channels == 0:
        raise InputError("there are no images to learn from: the iterable of features was empty.")
