"""How AD-DINOv3's adapters are trained: three losses, AdamW, a short warm-up, and a run that can go on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinofast.errors import ArtifactError, InputError
from dinofast.models import zero_shot_maps as maps
from dinofast.models.feature_store import FeatureStore
from dinofast.models.tokens import check_finite_cls
from dinofast.types import Features

if TYPE_CHECKING:
    from dinofast.models.iterative import Checkpoint
    from dinofast.progress import Progress

WEIGHTS = (0.25, 0.5, 0.25)
"""Shares of the losses on the awareness map, on the cross-modal map and on the global logits."""

NAMES = ("patch_adapter", "cls_adapter", "text_adapter")
_EPS = 1e-5
_AT_ONCE = 8
"""Images of one forward pass, to bound its memory; a batch is the sum of them."""


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training; see `ZeroShot`."""

    n_taps: int
    n_epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    interleaved: bool
    seed: int


class TruthStore(FeatureStore):
    """Standardized patch features on disk; class tokens, masks (one bit a pixel) and classes in memory.

    Attributes:
        classes: class name of every image, None where its batch named none.
        sizes: (H, W) of every mask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.classes: list[str | None] = []
        self.sizes: list[tuple[int, int]] = []
        self._cls: list[Tensor] = []
        self._masks: list[bytes] = []
        self._truth = hashlib.blake2b(digest_size=16)

    @property
    def fingerprint(self) -> str:
        """A hash of the features, the truth and their order."""
        return super().fingerprint + self._truth.hexdigest()

    def add(self, batch: Features) -> None:
        """Add a batch with masks and class tokens.

        Raises:
            InputError: see `check_truth` and `FeatureStore.append`.
        """
        masks, cls = check_truth(batch)
        self.append(maps.standardized(batch.tensor))
        packed = [np.packbits(mask).tobytes() for mask in masks.cpu().numpy()]
        tokens = list(cls.detach().to("cpu", torch.float32, copy=True))
        for token, mask in zip(tokens, packed, strict=True):
            self._truth.update(token.numpy().tobytes() + mask)
            self._truth.update(repr((batch.image_size, batch.class_name)).encode())
        self._masks += packed
        self._cls += tokens
        self.classes += [batch.class_name] * len(batch)
        self.sizes += [batch.image_size] * len(batch)

    def truth(self, images: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Give class tokens (B, D) and masks (B, H, W), bool, of images of one size, on `device`."""
        height, width = self.sizes[images[0]]
        bits = [np.unpackbits(np.frombuffer(self._masks[i], np.uint8), count=height * width) for i in images]
        masks = torch.from_numpy(np.stack(bits)).bool().view(-1, height, width)
        return torch.stack([self._cls[i] for i in images]).to(self.device), masks.to(self.device)

    def alike(self, images: Sequence[int]) -> Iterator[list[int]]:
        """Cut a batch into few groups of images of one grid and one size."""
        groups: dict[tuple[tuple[int, int], tuple[int, int]], list[int]] = {}
        for i in images:
            groups.setdefault((self.grids[i], self.sizes[i]), []).append(i)
        for group in groups.values():
            for start in range(0, len(group), _AT_ONCE):
                yield group[start : start + _AT_ONCE]


def check_cls(features: Features) -> Tensor:
    """Give the class tokens (B, D) of checked features.

    Raises:
        InputError: there are none, or of another shape or device.
    """
    cls, d = features.cls, features.tensor.shape[3]
    if cls is None:
        raise InputError(
            "zero_shot needs class tokens, and these features have none (cls=None); use a DINOv3 or DINOv2 "
            "backbone."
        )
    if cls.shape != (len(features), d) or not cls.is_floating_point() or cls.device != features.tensor.device:
        raise InputError(
            f"cls must be floating (B, D) = {(len(features), d)} on {features.tensor.device}, got "
            f"{cls.dtype} {tuple(cls.shape)} on {cls.device}"
        )
    return cls


def finite_cls(features: Features) -> Tensor:
    """Give the class tokens (B, D) of checked features, all finite.

    Raises:
        InputError: see `check_cls`; NaN or infinite ones.
    """
    cls = check_cls(features)
    check_finite_cls(cls)
    return cls


def check_grid(features: Features) -> None:
    """Refuse a grid of one patch, which has no deviation.

    Raises:
        InputError: h · w = 1.
    """
    if features.tensor.shape[1:3].numel() < 2:
        raise InputError("zero_shot standardizes over the patches of an image and needs 2 of them, got 1.")


def check_truth(batch: Features) -> tuple[Tensor, Tensor]:
    """Give masks (B, H, W) and class tokens (B, D) of checked features.

    Raises:
        InputError: no masks or class tokens, or of another form; a grid of one patch.
    """
    check_grid(batch)
    cls, masks = finite_cls(batch), batch.masks
    if masks is None:
        raise InputError(
            "zero_shot learns from images with masks, normal and abnormal, and a batch came without; set "
            "Features.masks, or load published adapters with ZeroShot.from_published instead of fitting."
        )
    wanted = (len(batch), *batch.image_size)
    if masks.dtype != torch.bool or tuple(masks.shape) != wanted:
        raise InputError(
            f"masks must be bool (B, H, W) = {wanted}, the images' size, got {masks.dtype} "
            f"{tuple(masks.shape)}; resize the masks as the images."
        )
    return masks, cls


def focal(normal: Tensor, abnormal: Tensor, truth: Tensor) -> Tensor:
    """Compute the focal loss (gamma 2, alpha 1) of two probabilities, image by image.

    Args:
        normal: (B, H, W) in [0, 1].
        abnormal: (B, H, W) in [0, 1].
        truth: (B, H, W), 1 where abnormal, else 0; softened to 1e-5 and 1 − 1e-5.

    Returns:
        (B,): mean over the pixels of −(1 − pt)² log pt, at least 0 but for rounding.

    References:
        Lin et al., Focal Loss for Dense Object Detection, ICCV 2017.
    """
    soft = truth.clamp(_EPS, 1 - _EPS)
    found = soft * abnormal + (1 - truth).clamp(_EPS, 1 - _EPS) * normal + _EPS
    return -((1 - found).square() * found.log()).mean(dim=(1, 2))


def dice(abnormal: Tensor, truth: Tensor) -> Tensor:
    """Compute the dice loss of a probability, image by image.

    Args:
        abnormal: (B, H, W) in [0, 1].
        truth: (B, H, W), 1 where abnormal, else 0.

    Returns:
        (B,) in [0, 1): 1 − (2 Σ p t + 1) / (Σ p + Σ t + 1).

    References:
        Milletari et al., V-Net, 3DV 2016.
    """
    overlap = (abnormal * truth).sum(dim=(1, 2))
    return 1 - (2 * overlap + 1) / (abnormal.sum(dim=(1, 2)) + truth.sum(dim=(1, 2)) + 1)


def losses(weights: dict[str, Tensor], patches: Tensor, cls: Tensor, matrix: Tensor, masks: Tensor) -> Tensor:
    """Compute the three losses of each image; their mean over images, times `WEIGHTS`, is what is trained.

    Args:
        weights: patch_adapter and cls_adapter (L, E, d).
        patches: standardized patch features (B, h, w, D).
        cls: class tokens (B, D).
        matrix: text matrix of each image (B, E, 2).
        masks: (B, H, W), bool.

    Returns:
        (B, 3): focal + dice of the awareness map, focal + dice of the cross-modal map, cross-entropy of the
        global logits with whether the mask marks anything.
    """
    b, h, w, _ = patches.shape
    size, truth = (int(masks.shape[1]), int(masks.shape[2])), masks.to(patches.dtype)
    tokens = maps.adapted(patches, weights["patch_adapter"]).reshape(
        len(weights["patch_adapter"]), b, h * w, -1
    )
    q = maps.unit(maps.adapted(cls, weights["cls_adapter"]))
    direction = (matrix[..., 1] - matrix[..., 0]).expand_as(q)
    against = torch.stack((maps.TEXT_SCALE * direction, maps.AWARE_SCALE * q), dim=-1)
    found = maps.compared(tokens, against).movedim(-1, 0)
    margin, aware = maps.upsampled(found.reshape(2, -1, b, h, w), size)
    attention = aware.sigmoid().mean(dim=0)
    abnormal, normal = margin.sigmoid().mean(dim=0), (-margin).sigmoid().mean(dim=0)
    label = masks.flatten(1).any(dim=1).long()
    return torch.stack(
        (
            focal(1 - attention, attention, truth) + dice(attention, truth),
            focal(normal, abnormal, truth) + dice(abnormal, truth),
            F.cross_entropy(maps.global_logits(q, matrix), label, reduction="none"),
        ),
        dim=1,
    )


def initial(n_taps: int, width: int, channels: int, seed: int) -> dict[str, Tensor]:
    """Draw adapters as torch draws a linear layer: uniform in ±1 / sqrt(inputs).

    Returns:
        patch_adapter and cls_adapter (n_taps, width, channels), text_adapter (2, width, width), on the CPU.
    """
    draw = torch.Generator().manual_seed(seed)
    shapes = ((n_taps, width, channels), (n_taps, width, channels), (2, width, width))
    return {
        name: (2 * torch.rand(shape, generator=draw) - 1) / math.sqrt(shape[2])
        for name, shape in zip(NAMES, shapes, strict=True)
    }


class Training:
    """Adapters with their optimizer, and everything that a checkpoint must hold.

    Args:
        recipe: the numbers.
        store: features to learn from.
        pairs: text vectors (C, 2, E) on the store's device.
        names: the C classes.
        default: class of images that name none.
    """

    def __init__(
        self, recipe: Recipe, store: TruthStore, pairs: Tensor, names: Sequence[str], default: str
    ) -> None:
        self.recipe, self.store, self.pairs = recipe, store, pairs
        self._index = {name: i for i, name in enumerate(names)} | {None: names.index(default)}
        drawn = initial(recipe.n_taps, pairs.shape[2], store.n_channels // recipe.n_taps, recipe.seed)
        self.weights = {name: w.to(store.device).requires_grad_() for name, w in drawn.items()}
        self._optimizer = torch.optim.AdamW(
            self.weights.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.epoch, self._best = 0, math.inf
        self._kept: dict[str, Tensor] = {}
        self.history: list[list[float]] = []
        self._steps_per_epoch = math.ceil(len(store) / recipe.batch_size)

    def run(
        self, validation: TruthStore | None, checkpoint: Checkpoint, progress: Progress
    ) -> dict[str, Tensor]:
        """Train all epochs that are left.

        Args:
            validation: images whose total loss chooses the epoch that is kept; None keeps the last.
            checkpoint: read before the first epoch, written after each.
            progress: called as progress("train", epochs done, epochs).

        Returns:
            The adapters, detached.

        Raises:
            InputError: the loss is not finite any more.
            ArtifactError: the checkpoint is of a run with other text vectors.
        """
        found = checkpoint.load()
        if found is not None:
            self._restore(*found)
        progress("train", self.epoch, self.recipe.n_epochs)
        while self.epoch < self.recipe.n_epochs:
            self.history.append(self._one_epoch())
            self.epoch += 1
            if validation is not None:
                with torch.no_grad():
                    terms = torch.cat(
                        [self._terms(validation, g) for g in validation.alike(range(len(validation)))]
                    )
                self.history[-1] += [self._total(terms.mean(dim=0).tolist())]
                if self.history[-1][-1] < self._best:
                    self._best = self.history[-1][-1]
                    self._kept = {name: w.detach().clone() for name, w in self.weights.items()}
            checkpoint.save(*self._snapshot())
            progress("train", self.epoch, self.recipe.n_epochs)
        return self._kept or {name: w.detach() for name, w in self.weights.items()}

    def _one_epoch(self) -> list[float]:
        """Take each image once; gives the mean of the three losses and their total."""
        sums = torch.zeros(3, device=self.store.device)
        dealt = self.store.batches(self.recipe.batch_size, _mixed(self.recipe.seed, self.epoch))
        for number, images in enumerate(dealt):
            self._optimizer.zero_grad()
            for group in self.store.alike(images):
                with torch.enable_grad():
                    terms = self._terms(self.store, group).sum(dim=0)
                    loss = terms @ terms.new_tensor(WEIGHTS) / len(images)
                    torch.autograd.backward(loss)
                sums += terms.detach()
            rate = self.recipe.learning_rate * self._warm_up(self.epoch * self._steps_per_epoch + number)
            for settings in self._optimizer.param_groups:
                settings["lr"] = rate
            self._optimizer.step()
        means: list[float] = (sums / len(self.store)).tolist()
        total = self._total(means)
        if not math.isfinite(total):
            raise InputError(
                f"training diverged: the loss is {total} in epoch {self.epoch + 1}; lower learning_rate "
                f"({self.recipe.learning_rate})."
            )
        return [*means, total]

    def _terms(self, store: TruthStore, images: list[int]) -> Tensor:
        """Give the losses (B, 3) of images of one grid and size."""
        cls, masks = store.truth(images)
        rows = torch.tensor([self._index[store.classes[i]] for i in images], device=store.device)
        matrices = maps.text_matrix(self.pairs, self.weights["text_adapter"], self.recipe.interleaved)
        # a product, whose gradient is the same in every run; that of indexing is not on a GPU
        matrix = (F.one_hot(rows, len(self.pairs)).to(matrices.dtype) @ matrices.flatten(1)).view(
            -1, *matrices.shape[1:]
        )
        return losses(self.weights, store.images(images), cls, matrix, masks)

    @staticmethod
    def _total(means: Sequence[float]) -> float:
        return sum(share * value for share, value in zip(WEIGHTS, means, strict=True))

    def _warm_up(self, step: int) -> float:
        """Rise from 0 to 1 over the first 3 % of all steps."""
        length = int(0.03 * self.recipe.n_epochs * self._steps_per_epoch)
        return min(1.0, step / length) if length else 1.0

    def _snapshot(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        tensors = {name: w.detach() for name, w in self.weights.items()} | {"pairs": self.pairs}
        for name, w in self.weights.items():
            tensors |= {f"{key}.{name}": value for key, value in self._optimizer.state[w].items()}
        tensors |= {f"kept.{name}": w for name, w in self._kept.items()}
        best = self._best if self._kept else None
        return tensors, {"epoch": self.epoch, "history": self.history, "best": best}

    def _restore(self, tensors: dict[str, Tensor], position: dict[str, object]) -> None:
        if not torch.equal(tensors["pairs"], self.pairs.cpu()):
            raise ArtifactError(
                "the checkpoint is of a run with other text vectors; delete it, or name another file."
            )
        for name, w in self.weights.items():
            with torch.no_grad():
                w.copy_(tensors[name])
            self._optimizer.state[w] = {
                "step": tensors[f"step.{name}"],
                **{key: tensors[f"{key}.{name}"].to(w.device) for key in ("exp_avg", "exp_avg_sq")},
            }
        self._kept = {n[5:]: t.to(self.store.device) for n, t in tensors.items() if n.startswith("kept.")}
        self.epoch, self.history = position["epoch"], position["history"]  # type: ignore[assignment]
        if self._kept:
            self._best = position["best"]  # type: ignore[assignment]


def _mixed(seed: int, epoch: int) -> int:
    """Give every epoch of every seed a shuffle of its own."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=7).digest(), "little")
