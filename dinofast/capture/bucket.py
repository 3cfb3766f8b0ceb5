"""One size: its recorded path, and two sets of buffers, so that a batch is copied while another computes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinofast.capture.path import Path
from dinofast.capture.recorder import Recorder, Recording
from dinofast.imaging import RGB
from dinofast.ops.registry import keeping


@dataclass(frozen=True)
class Results:
    """What a replay said of n images, on the host: (n,), (n, H, W) and (n,), see `Path`."""

    score: Tensor
    map: Tensor
    broken: Tensor


class Bucket:
    """A path recorded for images of one size, and what feeds it.

    Args:
        path: what to record.
        pixels: (H', W') of resized images.
        batch: images of one replay.
        recorder: of the device.

    Raises:
        InputError: the path cannot be recorded; nothing was.
    """

    def __init__(self, path: Path, pixels: tuple[int, int], batch: int, recorder: Recorder) -> None:
        self.batch = batch
        shape, byte = (batch, *pixels, 3), torch.uint8
        self._recorder, self._input = recorder, recorder.device(shape, byte)
        with recorder.aside():
            path(self._input)
            path.check(self._input)
        with keeping() as kept:
            self._recording = recorder.record(path, (self._input,))
        self._slots = [
            _Slot(
                recorder.host(shape, byte),
                recorder.device(shape, byte),
                tuple(recorder.host(x.shape, x.dtype) for x in self._recording.outputs),
            )
            for _ in range(2)
        ]
        self._turn = 0
        # whatever the device still reads or writes lives until it is done
        weakref.finalize(self, _finish, self._slots, self._input, self._recording, kept).atexit = False

    def submit(self, images: Sequence[RGB]) -> Callable[[], Results]:
        """Start on up to `batch` resized images; the places of others keep what they held.

        Args:
            images: each uint8 (H', W', 3); copied before this returns.

        Returns:
            What waits for the results and gives them; may be called at any time, and again.
        """
        slot, recorder = self._slots[self._turn], self._recorder
        self._turn = 1 - self._turn
        if slot.fetch is not None:
            slot.fetch()  # then everything that reads or writes these buffers is done
        held = slot.host.numpy()
        for place, image in enumerate(images):
            held[place] = image
        copied = recorder.copy(slot.staged, slot.host)
        fed, recording = self._input, self._recording  # the work must not hold the bucket
        done = recorder.run(lambda: _replay(slot, fed, recording), after=copied)
        found: list[Results] = []

        def fetch() -> Results:
            if not found:
                recorder.wait(done)
                found.append(Results(*(x[: len(images)].clone() for x in slot.results)))
                slot.fetch = None
            return found[0]

        slot.fetch = fetch
        return fetch


@dataclass
class _Slot:
    """Buffers of one batch on its way.

    Attributes:
        host: images, in memory that copies need not wait for.
        staged: the same on the device.
        results: on the host.
        fetch: takes the results out, while nobody has.
    """

    host: Tensor
    staged: Tensor
    results: tuple[Tensor, ...]
    fetch: Callable[[], Results] | None = None


def _replay(slot: _Slot, fed: Tensor, recording: Recording) -> None:
    fed.copy_(slot.staged)
    recording.replay()
    for target, source in zip(slot.results, recording.outputs, strict=True):
        target.copy_(source, non_blocking=True)


def _finish(slots: list[_Slot], *held: object) -> None:
    """Wait for what was started and not taken out; `held` is what that uses."""
    for slot in slots:
        if slot.fetch is not None:
            slot.fetch()
