"""AD-DINOv3: patches compared with sentences on normal and abnormal states; no normal images needed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dinofast.errors import ArtifactError, InputError
from dinofast.interop import takes_features
from dinofast.models import zero_shot_checkpoint
from dinofast.models import zero_shot_maps as maps
from dinofast.models.base import checked_stream
from dinofast.models.feature_store import FeatureStore
from dinofast.models.iterative import IterativeModel
from dinofast.models.params import check_number, check_seed
from dinofast.models.zero_shot_training import Recipe, Training, TruthStore, check_cls, check_grid
from dinofast.text_vectors import TextVectors, check_class_name
from dinofast.types import Features, Scores

if TYPE_CHECKING:
    from typing_extensions import Self

    from dinofast.models.iterative import Checkpoint
    from dinofast.progress import Progress

IMAGE_SCORES = ("global", "max", "mean")
COMPAT = ("ad-dinov3",)
_CLASS = "class/"


class ZeroShot(IterativeModel):
    """Score a patch by whether it is more like "a damaged X" than like "a flawless X".

    Small adapters bring patch and class tokens of several blocks, and the text vectors of a class, into one
    space. They are trained once, on images of any industrial set, or loaded as published (`from_published`);
    then any class that has text vectors is scored without images of its own. `fit` wants normal and abnormal
    images, each batch with `Features.masks`, `cls` and, where it is another than ours, its `class_name`.
    Features to be scored need at least 2 patches, `cls` unless `image_score` is "max", and `class_name`
    likewise; patch scores need no `cls`. All scores are in [0, 1].

    For each tap, patch tokens are standardized per image and channel, adapted and brought to unit length p;
    class tokens likewise to q, without the standardization. Map: the abnormal channel of softmax(100 p T),
    where T is the adapted text matrix, interpolated bilinearly with aligned corners before the softmax, then
    averaged over the taps; in (0, 1). Global logits: the mean over the taps of 100 q T. The anomaly-aware
    calibration, sigmoid(10 p·q), regularizes the training only; `awareness_map` shows it.

    Args:
        class_name: X, for images whose features name no class.
        text: file of text vectors, as `dinofast.text_vectors.TextVectors.save` writes it: `fit` trains on
            these classes, and keeps all vectors of the file.
        n_taps: blocks that the backbone taps, whose tokens lie side by side in D; as published the blocks
            (5, 11, 17, 23) of DINOv3 ViT-L/16.
        image_score: "global": the abnormal channel of the softmax of the global logits. "max": the largest
            value of the map. "mean": the mean of both. All are ours: the published code scores no images.
        n_epochs: passes over the training images.
        batch_size: images of one step.
        learning_rate: of AdamW, after a linear warm-up from 0 over the first 3 % of the steps.
        weight_decay: of AdamW.
        seed: of the initial adapters and of the shuffling.
        compat: None stacks the two adapted text vectors as columns of T. "ad-dinov3" interleaves them as the
            published code does, which its checkpoints need: each column is then half of the one and half of
            the other vector.

    Learned are 2 · L · E · d adapter weights of the taps and 2 · E² of the texts, 29.9 MB as published,
    beside 8 · E bytes a class. The adapted text matrix is computed once a class and kept until the state
    changes; training standardizes the features once, before the first epoch. The tower is never needed here.

    Unknown and not offered: the residual around two layers that the paper's figure shows in the adapter of
    the awareness map (the published code has one layer), and the prompts of that figure. The adapters start
    as torch's linear layers do.

    Attributes:
        history: of the last fit, a row an epoch: the awareness, cross-modal and global losses, their weighted
            total, and the total over the validation images where there are any; not saved.

    Raises:
        InputError: a parameter out of range.

    References:
        Yuan et al., AD-DINOv3, 2025, arXiv 2509.14084.

    >>> import tempfile
    >>> TextVectors({"brain": torch.eye(2, 8)}, "0" * 64, "toy").save(file := tempfile.mkdtemp() + "/text")
    >>> masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    >>> features = Features(torch.randn(2, 4, 4, 12), torch.randn(2, 12), (32, 32), masks=masks)
    >>> model = ZeroShot("brain", file, n_taps=2, n_epochs=1).fit([features])
    >>> tuple(model.score(features).map.shape), model.classes
    ((2, 32, 32), ['brain'])
    """

    name: ClassVar[str] = "zero_shot"
    learns_from_masks: ClassVar[bool] = True

    def __init__(
        self,
        class_name: str = "object",
        text: str | None = None,
        n_taps: int = 4,
        image_score: str = "global",
        n_epochs: int = 100,
        batch_size: int = 64,
        learning_rate: float = 1e-5,
        weight_decay: float = 1e-2,
        seed: int = 0,
        compat: str | None = None,
    ) -> None:
        super().__init__()
        check_class_name(class_name)
        for name, value in (("n_taps", n_taps), ("n_epochs", n_epochs), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number, at least 1, got {value!r}")
        check_number("above 0", lambda v: v > 0, learning_rate=learning_rate)
        check_number("at least 0", lambda v: v >= 0, weight_decay=weight_decay)
        check_seed(seed)
        if image_score not in IMAGE_SCORES:
            raise InputError(f"unknown image_score {image_score!r}; one of {', '.join(IMAGE_SCORES)}")
        if compat is not None and compat not in COMPAT:
            raise InputError(f"unknown compat {compat!r}; None or one of {', '.join(COMPAT)}")
        if text is not None and not isinstance(text, str):
            raise InputError(f"text must be the path of a file of text vectors, got {type(text).__name__}")
        self.class_name = class_name
        self.text = text
        self.n_taps = n_taps
        self.image_score = image_score
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.seed = seed
        self.compat = compat
        self.history: list[list[float]] = []
        self._matrices: tuple[Mapping[str, Tensor], dict[str, Tensor]] = ({}, {})

    @classmethod
    def from_published(
        cls,
        path: str | os.PathLike[str],
        text: TextVectors | str | os.PathLike[str],
        class_name: str = "object",
        *,
        image_score: str = "global",
        compat: str | None = "ad-dinov3",
    ) -> Self:
        """Load adapters of the published code, ready to score.

        Args:
            path: a checkpoint of the published code, `<epoch>.pth`; no code in it is run.
            text: text vectors, or the file of them; of the tower that the adapters were trained with, CLIP
                ViT-L/14-336 as published.
            class_name: see the class; a class of `text`.
            image_score: see the class.
            compat: see the class; "ad-dinov3" for adapters that the published code trained.

        Returns:
            The model, on the CPU.

        Raises:
            InputError: no such file; `class_name` is not in `text`, or the D of `text` is not the adapters'.
            ArtifactError: the file is torn, or not such a checkpoint; `text` is not a file of text vectors.
        """
        adapters = zero_shot_checkpoint.read(path)
        vectors = text if isinstance(text, TextVectors) else TextVectors.load(text)
        width = adapters["patch_adapter"].shape[1]
        if vectors.dim != width:
            raise InputError(
                f"{path}: its adapters are for text vectors of {width} channels, those of {vectors.source} "
                f"have {vectors.dim}; make them with the adapters' own tower."
            )
        model = cls(
            class_name,
            None if isinstance(text, TextVectors) else os.fspath(text),
            len(adapters["patch_adapter"]),
            image_score,
            compat=compat,
        )
        model._require(class_name, vectors.names)
        model.load_state(adapters | _as_state(vectors))
        return model

    @property
    def wants_cls(self) -> bool:
        """Whether class tokens are needed; `fit` needs them always."""
        return not self.is_fitted or self.image_score != "max"

    @property
    def n_channels(self) -> int:
        """D of the features that the model was fitted on."""
        weights = self.state()["patch_adapter"]
        return int(weights.shape[0] * weights.shape[2])

    @property
    def classes(self) -> list[str]:
        """The classes that have text vectors here, in order.

        Raises:
            InputError: the model is not fitted.
        """
        return [name.removeprefix(_CLASS) for name in self.state() if name.startswith(_CLASS)]

    def add_text(self, text: TextVectors | str | os.PathLike[str]) -> Self:
        """Add classes, of vectors or a file of them, to a fitted model; known classes get the new vectors.

        Returns:
            The model itself.

        Raises:
            InputError: not fitted, vectors of another tower, or no such file.
            ArtifactError: not a file of text vectors.
        """
        state = self.state()
        vectors = text if isinstance(text, TextVectors) else TextVectors.load(text)
        tower = bytes(state["tower"].tolist()).hex()
        if vectors.tower != tower:
            raise InputError(
                f"text vectors of another tower: {vectors.source} has the sha256 {vectors.tower[:12]}..., "
                f"this model's was {tower[:12]}...; make them with the tower of the fit."
            )
        added = {name: tensor.to(self.device) for name, tensor in _as_state(vectors).items()}
        self._state = state | added
        return self

    def for_class(self, name: str) -> Self:
        """Give this model for another class; both share what was learned.

        Raises:
            InputError: not fitted, or no text vectors of this class.
        """
        self._require(name, self.classes)
        model = type(self)(**self.params() | {"class_name": name})
        self._known()
        model._state, model._matrices = self._state, self._matrices
        return model

    @takes_features
    @torch.no_grad()
    def global_logits(self, features: Features) -> Tensor:
        """Compare class tokens with the texts: (B, 2), float32, normal and abnormal logit.

        Raises:
            InputError: see `score`.
        """
        self._check_queries(features)
        return self._global_logits(features)

    @takes_features
    @torch.no_grad()
    def awareness_map(self, features: Features) -> Tensor:
        """Show sigmoid(10 p·q), averaged over the taps: (B, H, W), float32; it takes no part in scores.

        Raises:
            InputError: see `score`.
        """
        self._check_queries(features)
        q = self._adapted_cls(features)
        found = maps.AWARE_SCALE * maps.compared(self._adapted(features.tensor), q[..., None])
        grid = found.view(self.n_taps, *features.tensor.shape[:3])
        return maps.upsampled(grid, features.image_size).sigmoid_().mean(dim=0)

    def _check_queries(self, features: Features) -> None:
        super()._check_queries(features)
        check_grid(features)

    def _scores(self, features: Features) -> Scores:
        margins = self._of_class(features)._margins(features.tensor)
        map = maps.upsampled(margins, features.image_size).sigmoid_().mean(dim=0)
        if self.image_score == "max":
            return Scores(map.amax(dim=(1, 2)), map)
        found = self._global_logits(features).softmax(dim=1)[:, 1]
        return Scores(found if self.image_score == "global" else (found + map.amax(dim=(1, 2))) / 2, map)

    def _patch_scores(self, features: Features) -> Tensor:
        """Give the abnormal channel of the softmax, without interpolation."""
        return self._of_class(features)._margins(features.tensor).sigmoid_().mean(dim=0)

    def _of_class(self, features: Features) -> Self:
        """Give the model for the class of checked features."""
        if features.class_name in (None, self.class_name):
            return self
        return self.for_class(str(features.class_name))

    def _global_logits(self, features: Features) -> Tensor:
        return maps.global_logits(self._adapted_cls(features), self._of_class(features)._matrix())

    def _adapted(self, tensor: Tensor) -> Tensor:
        """Standardize and adapt patch features (B, h, w, D); gives (L, B, N, E)."""
        tokens = maps.adapted(maps.standardized(tensor), self.state()["patch_adapter"])
        return tokens.view(self.n_taps, len(tensor), tensor.shape[1] * tensor.shape[2], tokens.shape[2])

    def _adapted_cls(self, features: Features) -> Tensor:
        cls = check_cls(features).float()
        return maps.unit(maps.adapted(cls, self.state()["cls_adapter"]))

    def _margins(self, tensor: Tensor) -> Tensor:
        """Compute abnormal minus normal logit of every patch and tap, (L, B, h, w)."""
        matrix = self._matrix()
        direction = maps.TEXT_SCALE * (matrix[:, 1:] - matrix[:, :1])
        return maps.compared(self._adapted(tensor), direction).view(self.n_taps, *tensor.shape[:3])

    def _matrix(self) -> Tensor:
        """Give the adapted text matrix (E, 2) of the class, computed once for a state."""
        known = self._known()
        if self.class_name not in known:
            self._require(self.class_name, self.classes)
            pair, weights = self._state[_CLASS + self.class_name], self._state["text_adapter"]
            known[self.class_name] = maps.text_matrix(pair[None], weights, self.compat is not None)[0]
        return known[self.class_name]

    def _known(self) -> dict[str, Tensor]:
        """Give the matrices computed for the present state, by class; empty for a new state."""
        if self._matrices[0] is not self._state:
            self._matrices = (self._state, {})
        return self._matrices[1]

    def _stored(self, features: Iterable[Features], n_channels: int | None = None) -> FeatureStore:
        return TruthStore.of(self._usable(features), n_channels)

    def _usable(self, features: Iterable[Features]) -> Iterator[Features]:
        """Pass on batches that training can use, so that others are known before the work."""
        names = self._vectors().names
        self._require(self.class_name, names)
        for batch in checked_stream(features):
            self._require(batch.class_name or self.class_name, names)
            d = batch.tensor.shape[3]
            if d % self.n_taps:
                raise InputError(
                    f"D = {d} is no multiple of n_taps = {self.n_taps}; load the backbone with that many "
                    "layers, or set n_taps to how many it has."
                )
            yield batch

    def _train(
        self, train: FeatureStore, validation: FeatureStore | None, checkpoint: Checkpoint, progress: Progress
    ) -> dict[str, Tensor]:
        assert isinstance(train, TruthStore)
        assert validation is None or isinstance(validation, TruthStore)
        vectors = self._vectors()
        names = ("n_taps", "n_epochs", "batch_size", "learning_rate", "weight_decay", "seed")
        recipe = Recipe(interleaved=self.compat is not None, **{name: getattr(self, name) for name in names})
        pairs = torch.stack([vectors.vectors[name] for name in vectors.names]).to(train.device)
        with torch.inference_mode(False):
            training = Training(recipe, train, pairs.clone(), vectors.names, self.class_name)
            learned = training.run(validation, checkpoint, progress)
        self.history = training.history
        return learned | {name: t.to(train.device) for name, t in _as_state(vectors).items()}

    def _vectors(self) -> TextVectors:
        if self.text is None:
            raise InputError(
                "zero_shot needs text vectors to fit: make them with dinofast.backbone.text.load(TOWER)"
                f".vectors([{self.class_name!r}]).save(FILE), and pass text=FILE."
            )
        return TextVectors.load(self.text)

    def _require(self, name: str, known: list[str]) -> None:
        check_class_name(name)
        if name not in known:
            raise InputError(
                f"no text vectors of class {name!r}, only of {', '.join(known)}; choose one of these as "
                "class_name, or make vectors of that class with dinofast.backbone.text."
            )

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        shapes = {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}
        cube = state.get("patch_adapter", torch.empty(0))
        taps, width, channels = cube.shape if cube.dim() == 3 else (0, 0, 0)
        wanted: dict[str, Any] = {
            "patch_adapter": (torch.float32, (self.n_taps, width, channels)),
            "cls_adapter": (torch.float32, (self.n_taps, width, channels)),
            "text_adapter": (torch.float32, (2, width, width)),
            "tower": (torch.uint8, (32,)),
            _CLASS + self.class_name: (torch.float32, (2, width)),
        }
        wanted |= {name: (torch.float32, (2, width)) for name in state if name.startswith(_CLASS)}
        if shapes != wanted or 0 in (taps, width, channels):
            listed = ", ".join(f"{n} {dtype} {shape}" for n, (dtype, shape) in shapes.items())
            raise ArtifactError(
                f"a zero_shot of n_taps={self.n_taps} for class {self.class_name!r} holds patch_adapter, "
                "cls_adapter (taps, E, d), text_adapter (2, E, E), tower (32,) and text vectors (2, E) of "
                f"its classes; this holds {listed or 'nothing'}"
            )


def _as_state(vectors: TextVectors) -> dict[str, Tensor]:
    """Give what a model keeps of text vectors: the tower's sha256 (32,) and (2, E) of each class."""
    tower = torch.tensor(list(bytes.fromhex(vectors.tower)), dtype=torch.uint8)
    return {"tower": tower} | {_CLASS + name: pair for name, pair in vectors.vectors.items()}
