"""Models that go over their features many times: stored once, resumed from a checkpoint."""

from __future__ import annotations

import contextlib
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dinofast import artifact
from dinofast.errors import ArtifactError
from dinofast.files import check_writable
from dinofast.interop import TensorBatches
from dinofast.models.base import Model
from dinofast.models.feature_store import FeatureStore
from dinofast.types import Features

if TYPE_CHECKING:
    from typing_extensions import Self

    from dinofast.progress import Progress


class Checkpoint:
    """Where a training run stands, in a file of its own; without a path nothing is read or written.

    Args:
        path: file, or None.
        run: what tells this run from any other, as JSON, as far as it is known before the features are read;
            `tell` adds the rest.

    Raises:
        InputError: the file cannot be written or read.
        ArtifactError: the file is torn, or of another run.
    """

    def __init__(self, path: str | os.PathLike[str] | None, run: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._run = dict(run)
        if self._path is not None:
            check_writable(self._path)
            self._read(whole=False)

    def tell(self, **more: str | None) -> None:
        """Add to what tells this run from any other, such as fingerprints of the features."""
        self._run |= more

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the tensors and the position last saved; None when the run has not begun.

        Raises:
            ArtifactError: the file is torn, or of another run.
        """
        return self._read(whole=True)

    def _read(self, *, whole: bool) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the file and compare its run with all of this one, or with what is known so far."""
        if self._path is None or not self._path.exists():
            return None
        tensors, config = artifact.read(self._path, kind="checkpoint")
        found = config.get("run") or {}
        compared = {*found, *self._run} if whole else self._run
        if names := [n for n in sorted(compared) if found.get(n) != self._run.get(n)]:
            raise ArtifactError(
                f"{self._path}: is the checkpoint of another run ({', '.join(names)} differ); "
                "delete it, or name another file."
            )
        return tensors, config["position"]

    def save(self, tensors: Mapping[str, Tensor], position: Mapping[str, Any]) -> None:
        """Write tensors and a position of JSON values, whole or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        if self._path is not None:
            artifact.write(self._path, "checkpoint", tensors, {"run": self._run, "position": dict(position)})


class IterativeModel(Model):
    """Base of models trained over several epochs; a subclass writes `_train` instead of `_learn`."""

    merges: ClassVar[bool] = False
    order_free: ClassVar[bool] = False

    def fit(
        self,
        features: Iterable[Features],
        *,
        validation: Iterable[Features] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Learn from normal images over several epochs; what was learned before is replaced.

        The features are read once, batch by batch, into a temporary file of 4 · N · D bytes (TMPDIR says
        where) and trained on from there, so memory grows with the model only. The batches' sizes do not
        matter, the order of the images does: it is what the seed shuffles.

        Args:
            features: batches with tensors (B, h, w, D), finite; grids and B may differ, D may not.
            validation: normal images that were held back, to choose the best epoch; None keeps the last.
            checkpoint: file in which the run is kept as it goes; when it is there already, the same run
                goes on from it and ends with the same numbers.
            progress: called as progress(stage, done, total).

        Returns:
            The model itself. When an error is raised, the model is as it was.

        Raises:
            InputError: see `Model.fit`; a folder is full or cannot be written.
            ArtifactError: `checkpoint` is torn, or of other parameters, images or validation images.
        """
        with TensorBatches(features) as batches, TensorBatches(validation or ()) as held_back:
            given = None if validation is None else held_back
            self._state = self._learn(batches, given, checkpoint, progress)
        return self

    @torch.no_grad()
    def _learn(
        self,
        features: Iterable[Features],
        validation: Iterable[Features] | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Tensor]:
        kept = Checkpoint(checkpoint, self.config())
        with contextlib.ExitStack() as stack:
            train = stack.enter_context(self._stored(features))
            held_back = None
            if validation is not None:
                held_back = stack.enter_context(self._stored(validation, train.n_channels))
            kept.tell(
                features=train.fingerprint, validation=None if held_back is None else held_back.fingerprint
            )
            report = progress or (lambda _stage, _done, _total: None)
            return self._train(train, held_back, kept, report)

    def _stored(self, features: Iterable[Features], n_channels: int | None = None) -> FeatureStore:
        """Store what `_train` needs of a stream, read once."""
        return FeatureStore.of(features, n_channels)

    @abstractmethod
    def _train(
        self, train: FeatureStore, validation: FeatureStore | None, checkpoint: Checkpoint, progress: Progress
    ) -> dict[str, Tensor]:
        """Turn stored features into a state, on `train.device`; must not touch the present one."""
