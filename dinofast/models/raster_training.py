"""Training of one `RasterNet` on stored features: a seeded run that can be saved and taken up again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinofast.errors import InputError
from dinofast.models.feature_store import FeatureStore
from dinofast.models.raster_net import RasterNet

PASS_PATCHES = 8192
"""Patches that go through the network at once; a batch of more is summed up. Bounds memory, not results."""

SMALLEST_STD = 1e-6
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 0.01
"""Of AdamW."""


@dataclass(frozen=True)
class Recipe:
    """How to train; see `SpatialAR` for the meaning of each."""

    loss: str
    batch_size: int
    learning_rate: float
    noise_probability: float
    noise_scale: float
    dropout: float
    clip_norm: float | None
    init: str


class Run:
    """One network in training, with all that decides how it goes on.

    Args:
        net: its layers.
        recipe: how to train.
        seed: of everything random; nothing else is drawn from, and no other generator is touched.
        device: where to train.
    """

    def __init__(self, net: RasterNet, recipe: Recipe, seed: int, device: torch.device) -> None:
        self._net, self._recipe = net, recipe
        self._draw = torch.Generator().manual_seed(seed)
        drawn = net.draw(recipe.init, self._draw)
        self.weights = {name: t.to(device).requires_grad_() for name, t in drawn.items()}
        self._steps = 0
        self._mean, self._square = (
            {name: torch.zeros_like(t, requires_grad=False) for name, t in self.weights.items()}
            for _ in BETAS
        )
        self._best = {name: t.detach().clone() for name, t in self.weights.items()}
        self._best_loss = math.inf

    def epoch(self, store: FeatureStore) -> float:
        """Go once over all images in a new order; gives the mean loss of the batches.

        Raises:
            InputError: the loss or a weight is no longer finite.
        """
        order = int(torch.randint(2**31, (), generator=self._draw))
        losses = [self._step(store, images) for images in store.batches(self._recipe.batch_size, order)]
        mean = math.fsum(losses) / len(losses)
        if not math.isfinite(mean) or not all(bool(t.isfinite().all()) for t in self.weights.values()):
            raise InputError(
                f"the training diverged: the loss is {mean}, or weights are no longer finite; lower "
                f"learning_rate ({self._recipe.learning_rate}), or set clip_norm, for instance to 1.0."
            )
        return mean

    def judge(self, store: FeatureStore) -> float:
        """Keep the present weights as the best where their loss on `store` is the lowest so far; gives it.

        The loss is the mean over all patches of the images, without noise or dropout. A tie keeps the older.
        """
        net, loss = self._net, 0.0
        with torch.no_grad():
            for clean in _passes(store, range(len(store))):
                loss += net.errors(self.weights, clean, clean, self._recipe.loss).sum().item() / store.n_rows
        if loss < self._best_loss:
            self._best = {name: t.detach().clone() for name, t in self.weights.items()}
            self._best_loss = loss
        return loss

    def result(self) -> dict[str, Tensor]:
        """Give the best weights, or the present ones where none were judged."""
        found = self.weights if self._best_loss == math.inf else self._best
        return {name: t.detach().clone() for name, t in found.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Give everything that decides how the run goes on; the tensors are not copied."""
        counts = torch.tensor([self._steps, self._best_loss], dtype=torch.float64)
        found = {"generator": self._draw.get_state(), "counts": counts}
        for group, tensors in self._groups().items():
            found |= {f"{group}.{name}": t.detach() for name, t in tensors.items()}
        return found

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the run where `tensors` was called."""
        self._draw.set_state(tensors["generator"])
        steps, self._best_loss = tensors["counts"].tolist()
        self._steps = int(steps)
        for group, own in self._groups().items():
            for name, t in own.items():
                t.copy_(tensors[f"{group}.{name}"])

    def _groups(self) -> dict[str, dict[str, Tensor]]:
        return {"weights": self.weights, "best": self._best, "mean": self._mean, "square": self._square}

    def _step(self, store: FeatureStore, images: Sequence[int]) -> float:
        """Take one step on a batch; gives its loss, the mean over all patches."""
        recipe, loss = self._recipe, 0.0
        noisy = torch.rand((), generator=self._draw).item() < recipe.noise_probability
        patches = sum(math.prod(store.grids[i]) for i in images)
        for clean in _passes(store, images):
            source = self._noised(clean) if noisy else clean
            errors = self._net.errors(self.weights, source, clean, recipe.loss, recipe.dropout, self._draw)
            part = errors.sum() / patches
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        if recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.weights.values(), recipe.clip_norm)
        self._descend()
        return loss

    @torch.no_grad()
    def _descend(self) -> None:
        """Take a step of AdamW and drop the gradients.

        Written out: torch.optim imports torch._dynamo at its first step, which takes seconds.
        """
        self._steps += 1
        rate = self._recipe.learning_rate
        first, second = (1 - beta**self._steps for beta in BETAS)
        for name, weight in self.weights.items():
            mean, square, slope = self._mean[name], self._square[name], weight.grad
            assert slope is not None
            mean.lerp_(slope, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(slope, slope, value=1 - BETAS[1])
            weight.mul_(1 - rate * WEIGHT_DECAY)
            weight.addcdiv_(mean, square.sqrt().div_(math.sqrt(second)).add_(EPS), value=-rate / first)
            weight.grad = None

    def _noised(self, clean: Tensor) -> Tensor:
        """Add noise in proportion to the spread of each channel over the patches of each image."""
        spread = clean.std(dim=(1, 2), keepdim=True).clamp_min(SMALLEST_STD)
        noise = torch.randn(clean.shape, generator=self._draw).to(clean.device)
        return clean + self._recipe.noise_scale * spread * noise


def _passes(store: FeatureStore, images: Sequence[int]) -> Iterator[Tensor]:
    """Read images in runs of one grid, (B, h, w, D), at most `PASS_PATCHES` patches where B > 1."""
    by_grid: dict[tuple[int, int], list[int]] = {}
    for i in images:
        by_grid.setdefault(store.grids[i], []).append(i)
    for (h, w), alike in by_grid.items():
        most = max(1, PASS_PATCHES // (h * w))
        for start in range(0, len(alike), most):
            yield store.images(alike[start : start + most])
