"""Features of many images on disk, for models that read them more than once and in another order."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dinofast.errors import InputError
from dinofast.models.base import checked_stream
from dinofast.types import Features

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


class FeatureStore:
    """The patch features of images, 4 · h · w · D bytes each, in a nameless temporary file.

    The file is gone when the store is closed or the process ends, however it ends. It lies where Python puts
    temporary files, which TMPDIR decides.

    Attributes:
        device: where the features came from, and where they go back to.
        n_channels: D.
        grids: patch grid (h, w) of every image, in order.

    >>> with FeatureStore.of([Features(torch.ones(3, 2, 2, 5), None, (8, 8))]) as store:
    ...     len(store), store.n_rows, store.rows([2, 0]).shape
    (3, 12, torch.Size([8, 5]))
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._starts = [0]
        self._digest = hashlib.blake2b(digest_size=16)
        self.device = torch.device("cpu")
        self.n_channels = 0
        self.grids: list[tuple[int, int]] = []

    @classmethod
    def of(cls, features: Iterable[Features], n_channels: int | None = None) -> Self:
        """Store every batch of a stream, read once.

        Args:
            features: see `Model.fit`.
            n_channels: D that they must have; None takes any.

        Raises:
            InputError: see `Model.fit`; another D; the temporary folder is full.
        """
        store = cls()
        try:
            for batch in checked_stream(features):
                d = batch.tensor.shape[3]
                if n_channels not in (None, d):
                    raise InputError(
                        f"D of the validation images is {d}, of the others {n_channels}; "
                        "use one backbone and one set of layers."
                    )
                store.add(batch)
        except BaseException:
            store.close()
            raise
        return store

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def n_rows(self) -> int:
        """Patches of all images."""
        return self._starts[-1]

    @property
    def fingerprint(self) -> str:
        """A hash of the features and their order: the same for the same images, whatever their batches."""
        found = self._digest.copy()
        found.update(str((self.n_channels, self.grids)).encode())
        return found.hexdigest()

    def add(self, batch: Features) -> None:
        """Add a checked batch; a subclass keeps more of it than the patch features."""
        self.append(batch.tensor)

    def append(self, tensor: Tensor) -> None:
        """Add images (B, h, w, D), floating; D as before.

        Raises:
            InputError: the temporary folder is full; what was stored stays.
        """
        if not self.grids:
            self.device, self.n_channels = tensor.device, tensor.shape[3]
        block = memoryview(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data).cast("B")
        try:
            offset, done = self._starts[-1] * self.n_channels * 4, 0
            while done < block.nbytes:
                done += os.pwrite(self._file.fileno(), block[done:], offset + done)
        except OSError as error:
            raise InputError(
                f"{tempfile.gettempdir()}: cannot hold the features of image {len(self)} and on "
                f"({error.strerror}); free space there, or set TMPDIR to another disk."
            ) from error
        self._digest.update(block)
        b, h, w = tensor.shape[:3]
        self.grids += [(h, w)] * b
        self._starts += [self._starts[-1] + (i + 1) * h * w for i in range(b)]

    def rows(self, images: Iterable[int]) -> Tensor:
        """Read the patches of some images, one after the other; gives (n, D) float32 on `device`."""
        images = list(images)
        counts = [self._starts[i + 1] - self._starts[i] for i in images]
        found = torch.empty(sum(counts), self.n_channels)
        for part, i in zip(torch.split(found, counts), images, strict=True):
            self._read(part, self._starts[i])
        return found.to(self.device)

    def images(self, images: Sequence[int]) -> Tensor:
        """Read images of one grid; gives (B, h, w, D) float32 on `device`."""
        return self.rows(images).view(len(images), *self.grids[images[0]], self.n_channels)

    def sample(self, n: int, seed: int) -> Tensor:
        """Read `n` distinct patches, or all when there are fewer, each as likely; in the order of the file.

        Returns:
            (min(n, n_rows), D) float32 on `device`.
        """
        drawn = _distinct(n, self.n_rows, torch.Generator().manual_seed(seed))
        found = torch.empty(len(drawn), self.n_channels)
        for row, start in zip(torch.split(found, 1), drawn.tolist(), strict=False):
            self._read(row, start)
        return found.to(self.device)

    def batches(self, size: int, seed: int | None = None) -> Iterator[list[int]]:
        """Deal the images out in batches, the last one perhaps smaller; shuffled when there is a seed."""
        order = torch.arange(len(self))
        if seed is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        yield from (part.tolist() for part in torch.split(order, size))

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, out: Tensor, start: int) -> None:
        """Fill contiguous float32 rows with the patches from `start` on."""
        target = memoryview(out.numpy().data).cast("B")
        offset, done = start * self.n_channels * 4, 0
        while done < target.nbytes:
            read = os.preadv(self._file.fileno(), [target[done:]], offset + done)
            if read == 0:
                raise InputError(f"{tempfile.gettempdir()}: the stored features were cut short; fit again.")
            done += read


def _distinct(n: int, total: int, generator: torch.Generator) -> Tensor:
    """Draw `n` distinct numbers below `total`, or all, in order; memory grows with `n` alone."""
    if 2 * n >= total:
        return torch.randperm(total, generator=generator)[:n].sort().values
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < n:
        more = torch.randint(total, (n - len(drawn),), generator=generator)
        drawn = torch.cat([drawn, more]).unique()  # type: ignore[no-untyped-call]
    return drawn
