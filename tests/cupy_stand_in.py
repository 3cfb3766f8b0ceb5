"""A GPU, its streams and CuPy's arrays as far as dinofast uses them, in host memory."""

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch


class Foreign:
    """What any other library may hand over: it speaks DLPack and nothing else."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


class FakeStream:
    def __init__(self, address, log):
        self.cuda_stream, self.device, self.log = address, "cuda:0", log

    def wait_stream(self, other):
        self.log.append(f"{self.cuda_stream} waits for {other.cuda_stream}")


@pytest.fixture
def gpu(monkeypatch):
    """A make-believe GPU: torch works on stream 16; a log of which stream waits for which."""
    state = SimpleNamespace(log=[], current=None, cupy=0)

    def stream(address, device=None):
        return FakeStream(address, state.log)

    @contextmanager
    def entered(chosen):
        before, state.current = state.current, chosen
        yield
        state.current = before

    state.current = stream(16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "ExternalStream", stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: stream(0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: state.current)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    cupy = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(get_current_stream=lambda _: SimpleNamespace(ptr=state.cupy))
    cupy.from_dlpack = CupyArray
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return state


class CupyArray(Foreign):
    """CuPy's array as far as it is used, in host memory."""

    __module__ = "cupy"
    device = SimpleNamespace(id=0)
    ndim = 4

    @property
    def strides(self):
        return self.tensor.numpy().strides
