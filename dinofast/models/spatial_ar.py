"""The spatial autoregressive network: a patch is as abnormal as its context fails to predict it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dinofast.errors import ArtifactError, InputError
from dinofast.models import raster_checkpoint
from dinofast.models.base import checked_stream
from dinofast.models.feature_store import FeatureStore
from dinofast.models.iterative import Checkpoint, IterativeModel
from dinofast.models.raster_net import INITS, LOSSES, TAPS, RasterNet
from dinofast.models.raster_training import Recipe, Run
from dinofast.types import Features

if TYPE_CHECKING:
    from typing_extensions import Self

    from dinofast.progress import Progress

DIRECTIONS = {"forward": ("forward",), "mean": ("forward", "backward"), "min": ("forward", "backward")}
"""Name -> the networks that are trained."""

KEEPS = ("best", "last")
_ABOVE_ZERO, _BELOW_ONE = math.nextafter(0.0, 1.0), math.nextafter(1.0, 0.0)
_SIGNS = {"forward": 1, "backward": -1}


class SpatialAR(IterativeModel):
    """Predict every patch from its neighbors with a small convolutional network; score what surprises it.

    `n_layers` dilated 3 × 3 convolutions, ReLU between them, zeros beyond the border, trained on normal
    images to give the features themselves. Features are taken as they are, without normalization.

    Patch score: the loss of the patch, from the features without noise. Map: bilinear, without blur. The
    published code has no image score; the one here, our choice, is the mean of the top 1 % of the patch
    scores, T = floor(P / 100) of an image's P patches; the largest where P < 100.

    Args:
        mode: what a patch is predicted from. "causal": from patches before it in raster order, never from
            itself. "bidirectional": the first layer sees the eight neighbors, the others all nine taps;
            two steps of one dilation lead back, so a patch does reach its own prediction. "standard": no mask
            at all, a patch sees itself at once.
        dilations: one number for all layers, or a list of one each; the last serves the layers after it. With
            one dilation d, patches see others only at distances that are multiples of d. [2, 4, 4, 8] was the
            default of the first published commit.
        n_layers: convolutions, at least 1.
        hidden: channels between them, at least 1.
        direction: "forward", one network in raster order; "mean" or "min" of its patch scores and those of a
            second one, with its own weights, draws and best epoch, that runs the other way, as on the map
            turned by 180°. The first is the same network in all three.
        loss: "mse": mean over the channels of the squared difference, at least 0. "cosine": 1 − cosine of
            features and prediction, in [0, 2]; 1 where one of the two is zero.
        n_epochs: times that training goes over the images.
        batch_size: images of one step of AdamW (betas 0.9 and 0.999, weight decay 0.01); the loss is the mean
            over all their patches, also where grids differ.
        learning_rate: of AdamW, without a schedule; above 0.
        noise_probability: share of the batches whose input gets noise, in [0, 1]; the target never does.
        noise_scale: its standard deviation, at least 0, in units of that of each channel over the patches of
            the image (with n − 1 below the fraction; at least 1e-6).
        dropout: probability with which a hidden value is zeroed in training, in [0, 1).
        clip_norm: largest norm of the gradient of one network; None does not clip.
        init: weights and biases are drawn from ±1/√fan-in. "full" counts all nine taps into it, masked ones
            too, as the framework's convolution of the published runs; "active" those that are there, as a
            later version of the code.
        keep: "best": the epoch of lowest loss on the validation images of `fit`, the earlier of equals; the
            last where there are none. "last": the last one always.
        seed: of weights, order, noise and dropout; the global generator is neither used nor changed. The same
            seed gives the same bytes on one machine with one number of threads.

    Grids may differ between images and need not be square, but every dilation must be smaller than both
    sides. Time per image grows with the patches; in training, memory with at most 8192 patches at once, and
    four times the weights.

    Left out on purpose: the published code judges with anomalous validation images too, and also keeps the
    epoch of best average precision on the test set, which flatters its numbers; give normal images as
    `validation`. It maps every data set to 240 × 240 pixels; here `image_size` of the features decides, and
    (240, 240) repeats that. Its metric squashes a batch by a sigmoid where a score exceeds 1, which breaks
    the ranking between batches; maps here are the raw scores. Which dilations and which epoch the paper
    reports is not known; its "standard conv" is most likely mode "causal" with dilation 1, not "standard".

    Raises:
        InputError: a parameter out of range.

    References:
        Erdil et al., "Spatial autoregressive modeling of DINOv3 embeddings for unsupervised anomaly
        detection", 2026, arXiv 2603.02974.

    >>> from dinofast.types import Features
    >>> normal = Features(torch.randn(4, 8, 8, 16), None, (32, 32))
    >>> model = SpatialAR(dilations=1, hidden=8, n_epochs=2).fit([normal])
    >>> tuple(model.score(normal).map.shape)
    (4, 32, 32)
    """

    name: ClassVar[str] = "spatial_ar"

    def __init__(
        self,
        mode: str = "causal",
        dilations: int | list[int] = 4,
        n_layers: int = 5,
        hidden: int = 256,
        direction: str = "forward",
        loss: str = "mse",
        n_epochs: int = 40,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        noise_probability: float = 0.2,
        noise_scale: float = 0.03,
        dropout: float = 0.0,
        clip_norm: float | None = None,
        init: str = "full",
        keep: str = "best",
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.mode = mode
        self.dilations = list(dilations) if isinstance(dilations, tuple) else dilations
        self.n_layers = n_layers
        self.hidden = hidden
        self.direction = direction
        self.loss = loss
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.noise_probability = noise_probability
        self.noise_scale = noise_scale
        self.dropout = dropout
        self.clip_norm = clip_norm
        self.init = init
        self.keep = keep
        self.seed = seed
        _check_params(self.params())

    @classmethod
    def from_published(
        cls,
        path: str | os.PathLike[str],
        backward: str | os.PathLike[str] | None = None,
        **params: Any,
    ) -> Self:
        """Load what the published code trained; no code in the file is run.

        Args:
            path: checkpoint of the network in raster order, such as model_best_val_loss.pth.
            backward: that of a network trained on maps turned by 180°; None where there is none.
            params: arguments of the class. The files tell mode, layers and hidden channels, but neither
                `dilations` nor `loss`: those must be the ones of the training. With `backward`, `direction`
                is "mean" unless given.

        Returns:
            A fitted model, on the CPU.

        Raises:
            InputError: no such file, parameters out of range, or of a number of files that does not fit.
            ArtifactError: torn, not such a checkpoint, or the two do not fit together.
        """
        paths = [path] if backward is None else [path, backward]
        found = [raster_checkpoint.read(p) for p in paths]
        if len({(f.mode, f.widths) for f in found}) > 1:
            kinds = " and ".join(f"{f.mode} with channels {list(f.widths)}" for f in found)
            raise ArtifactError(f"{path} and {backward} do not fit together: {kinds}.")
        told: dict[str, Any] = {
            "mode": found[0].mode,
            "n_layers": len(found[0].widths) - 1,
            "hidden": found[0].widths[1],
        }
        if clash := sorted(told.keys() & params.keys()):
            raise InputError(f"{path} tells {', '.join(clash)} itself; leave them out.")
        told["direction"] = "forward" if backward is None else "mean"
        model = cls(**told | params)
        if len(DIRECTIONS[model.direction]) != len(paths):
            raise InputError(
                f"direction {model.direction!r} wants {len(DIRECTIONS[model.direction])} checkpoints, got "
                f"{len(paths)}; `backward` names the second."
            )
        nets = zip(DIRECTIONS[model.direction], found, strict=True)
        model.load_state({f"{d}.{name}": t for d, net in nets for name, t in net.weights.items()})
        return model

    @property
    def n_channels(self) -> int:
        """D of the features that the model was fitted on."""
        return self.state()["forward.0.weight"].shape[1]

    def _stored(self, features: Iterable[Features], n_channels: int | None = None) -> FeatureStore:
        return FeatureStore.of(self._usable(features), n_channels)

    def _usable(self, features: Iterable[Features]) -> Iterator[Features]:
        """Pass on batches of grids that training can use, so that others are known before the work."""
        for batch in checked_stream(features):
            self._check_grid(*batch.tensor.shape[1:3])
            yield batch

    def _train(
        self, train: FeatureStore, validation: FeatureStore | None, checkpoint: Checkpoint, progress: Progress
    ) -> dict[str, Tensor]:
        judges = validation if self.keep == "best" else None
        recipe = Recipe(**{name: getattr(self, name) for name in Recipe.__dataclass_fields__})
        seeds = torch.randint(2**31, (2,), generator=torch.Generator().manual_seed(self.seed)).tolist()
        with torch.inference_mode(False), torch.enable_grad():
            runs = {
                d: Run(self._net(d, train.n_channels), recipe, seed, train.device)
                for d, seed in zip(DIRECTIONS[self.direction], seeds, strict=False)
            }
            done = 0
            if (saved := checkpoint.load()) is not None:
                done = saved[1]["epoch"]
                for d, run in runs.items():
                    run.restore(
                        {n.removeprefix(f"{d}."): t for n, t in saved[0].items() if n.startswith(f"{d}.")}
                    )
            for epoch in range(done, self.n_epochs):
                for run in runs.values():
                    run.epoch(train)
                    if judges is not None:
                        run.judge(judges)
                kept = {f"{d}.{n}": t for d, run in runs.items() for n, t in run.tensors().items()}
                checkpoint.save(kept, {"epoch": epoch + 1})
                progress("train", epoch + 1, self.n_epochs)
        return {f"{d}.{name}": t for d, run in runs.items() for name, t in run.result().items()}

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        first = state.get("forward.0.weight")
        if first is None or first.dim() != 3:
            raise ArtifactError("a spatial_ar holds forward.0.weight (T, D, hidden); here it is not.")
        nets = {d: self._net(d, first.shape[1]).shapes() for d in DIRECTIONS[self.direction]}
        wanted = {f"{d}.{name}": shape for d, shapes in nets.items() for name, shape in shapes.items()}
        if wanted.keys() != state.keys():
            raise ArtifactError(f"a {self!r} holds {sorted(wanted)}; this holds {sorted(state)}")
        for name, shape in wanted.items():
            found = state[name]
            if tuple(found.shape) != shape or found.dtype != torch.float32:
                raise ArtifactError(
                    f"{name} of a {self!r} must be float32 {shape}, this is {found.dtype} "
                    f"{tuple(found.shape)}"
                )
            if not bool(found.isfinite().all()):
                raise ArtifactError(f"{name} holds NaN or infinite values; the network was not trained well.")

    def _patch_scores(self, features: Features) -> Tensor:
        tensor = features.tensor
        self._check_grid(*tensor.shape[1:3])
        if len(tensor) == 0:
            return tensor.new_zeros(tensor.shape[:3], dtype=torch.float32)
        x = tensor.float()
        found = []
        for d in DIRECTIONS[self.direction]:
            weights = {name: self._state[f"{d}.{name}"] for name in self._net(d, self.n_channels).shapes()}
            found.append(self._net(d, self.n_channels).errors(weights, x, x, self.loss))
        both = torch.stack(found)
        return (both.amin(dim=0) if self.direction == "min" else both.mean(dim=0)).clamp_min(0)

    def _net(self, direction: str, n_channels: int) -> RasterNet:
        widths = (n_channels, *[self.hidden] * (self.n_layers - 1), n_channels)
        return RasterNet(self.mode, self._schedule(), widths, _SIGNS[direction])

    def _schedule(self) -> tuple[int, ...]:
        """List the dilation of every layer."""
        given = [self.dilations] if isinstance(self.dilations, int) else self.dilations
        return tuple(given[min(i, len(given) - 1)] for i in range(self.n_layers))

    def _check_grid(self, h: int, w: int) -> None:
        largest = max(self._schedule())
        if largest >= min(h, w):
            raise InputError(
                f"the patch grid is {h} × {w}, too small for a dilation of {largest}: taps of that layer "
                f"would never meet a patch; lower dilations below {min(h, w)}, or take larger images."
            )


def _check_params(params: Mapping[str, Any]) -> None:
    """Raise InputError for the first value that cannot be."""
    for name, allowed in (
        ("mode", list(TAPS)),
        ("direction", list(DIRECTIONS)),
        ("loss", list(LOSSES)),
        ("init", list(INITS)),
        ("keep", list(KEEPS)),
    ):
        if params[name] not in allowed:
            raise InputError(f"unknown {name} {params[name]!r}; one of {', '.join(allowed)}")
    for name in ("n_layers", "hidden", "n_epochs", "batch_size"):
        if not _whole(params[name], 1):
            raise InputError(f"{name} must be a whole number, at least 1, got {params[name]!r}")
    if not _whole(params["seed"], 0) or params["seed"] >= 2**63:
        raise InputError(f"seed must be a whole number in [0, 2**63), got {params['seed']!r}")
    dilations, n_layers = params["dilations"], params["n_layers"]
    given = dilations if isinstance(dilations, list) else [dilations]
    if not 1 <= len(given) <= n_layers or not all(_whole(d, 1) for d in given):
        raise InputError(
            f"dilations must be a whole number, at least 1, or a list of 1 to {n_layers} of them, "
            f"got {dilations!r}"
        )
    for name, low, high, words in (
        ("noise_probability", 0.0, 1.0, "in [0, 1]"),
        ("noise_scale", 0.0, math.inf, "at least 0"),
        ("dropout", 0.0, _BELOW_ONE, "in [0, 1)"),
        ("learning_rate", _ABOVE_ZERO, math.inf, "above 0"),
        ("clip_norm", _ABOVE_ZERO, math.inf, "above 0, or None"),
    ):
        value = params[name]
        if name == "clip_norm" and value is None:
            continue
        if not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
            raise InputError(f"{name} must be a finite number, {words}, got {value!r}")


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
