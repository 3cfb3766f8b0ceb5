"""What records and replays: a CUDA graph, and two lanes of work that run beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from dinofast.errors import InputError, KernelError


@dataclass(frozen=True)
class Recording:
    """A recorded function.

    Attributes:
        outputs: tensors that every replay writes anew, always in the same memory.
        replay: enqueues the function on what its inputs hold then; call it on the lane of `Recorder.run`.
    """

    outputs: tuple[Tensor, ...]
    replay: Callable[[], object]


class Recorder(Protocol):
    """A device with two lanes: copies from the host, and computation. What a lane is given, it does in order.

    Both return before the work is done. A mark, whatever it is, stands for the end of one piece of work.
    """

    def host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make host memory of zeros that copies need not wait for."""

    def device(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make device memory of zeros."""

    def aside(self) -> AbstractContextManager[object]:
        """Run what is inside on the lane of computation, and wait for it at the end."""

    def record(self, function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> Recording:
        """Record function(*inputs), which has run `aside` twice before and waits for nothing.

        Raises:
            KernelError: it cannot be recorded all the same.
        """

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Copy on the lane of copies; give a mark."""

    def run(self, work: Callable[[], object], after: Any) -> Any:
        """Call `work`, which enqueues computation that starts once `after` is reached; give a mark."""

    def wait(self, mark: Any) -> None:
        """Let the host wait for a mark."""


class CudaRecorder:
    """CUDA graphs that share one memory pool, and a stream for each lane.

    Args:
        device: the GPU that everything lies on.

    Raises:
        InputError: not a GPU, or none is here.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise InputError(
                f"capture records a CUDA graph, and this detector is on {device}; load its backbone with "
                "device='cuda' on a machine with an NVIDIA GPU, or call predict, which runs anywhere."
            )
        self._device = device
        make = cast("Callable[..., torch.cuda.Stream]", torch.cuda.Stream)
        self._compute, self._copies = make(device), make(device)
        self._pool = torch.cuda.graph_pool_handle()

    def host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make page-locked memory of zeros."""
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def device(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make device memory of zeros."""
        made = torch.zeros(tuple(shape), dtype=dtype, device=self._device)
        torch.cuda.current_stream(self._device).synchronize()
        return made

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Switch to the stream of computation, behind what the current one was given."""
        self._compute.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._compute):
                yield
        finally:
            self._compute.synchronize()

    def record(self, function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> Recording:
        """Record a CUDA graph; its intermediate memory is shared with earlier ones."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        with torch.cuda.device(self._device):
            before = torch.cuda.current_stream(self._device)
            try:
                with torch.cuda.graph(graph, self._pool, self._compute):
                    outputs = function(*inputs)
            except RuntimeError as error:
                raise KernelError(
                    f"this path cannot be recorded in a CUDA graph ({_reason(error)}); call predict instead."
                ) from error
            finally:  # ending a recording that failed raises before it leaves its stream
                torch.cuda.set_stream(before)
        return Recording(outputs, graph.replay)

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        """Copy on the stream of copies."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            mark: torch.cuda.Event = self._copies.record_event()
        return mark

    def run(self, work: Callable[[], object], after: torch.cuda.Event) -> torch.cuda.Event:
        """Enqueue on the stream of computation."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._compute):
            self._compute.wait_event(after)
            work()
            mark: torch.cuda.Event = self._compute.record_event()
        return mark

    def wait(self, mark: torch.cuda.Event) -> None:
        """Wait for an event."""
        mark.synchronize()


def _reason(error: BaseException) -> str:
    """Tell what failed first and what that led to, the first line of each."""
    told = (str(error).strip() or type(error).__name__).splitlines()[0]
    return told if error.__context__ is None else f"{_reason(error.__context__)}; then {told}"
