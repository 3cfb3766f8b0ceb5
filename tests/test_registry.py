"""The dispatcher: forced backends, refusals with reasons, an unknown name."""

import importlib.util
import logging
import weakref
from importlib.metadata import PackageNotFoundError

import pytest
import torch

import dinofast
from dinofast import ops
from dinofast.errors import InputError, KernelError
from dinofast.ops import registry
from dinofast.ops.registry import OPS, Kernel, choose, provide
from dinofast.ops.upsample_blur import resample

ARGS = (torch.eye(3), torch.eye(3))


@pytest.fixture
def op():
    """cosine_max with only its reference, whatever this machine offers."""
    whole = OPS["cosine_max"]
    kept = list(whole.kernels)
    whole.kernels[:] = [kernel for kernel in kept if kernel.backend == "reference"]
    yield whole
    whole.kernels[:] = kept


def offer(backend, refuse=lambda *_: None, devices=("cpu",)):
    provide("cosine_max", Kernel(backend, devices, lambda *_: (backend, None), refuse))


def test_the_first_offer_in_order_is_taken_whatever_the_order_of_offering(op):
    offer("triton")
    offer("cpu")
    assert choose(op, ARGS).backend == "cpu"
    assert [kernel.backend for kernel in op.kernels] == ["cpu", "triton", "reference"]


def test_a_refusal_moves_on_and_is_logged(op, caplog):
    offer("cpu", refuse=lambda *_: "wants float16, got torch.float32")
    with caplog.at_level(logging.DEBUG, "dinofast.ops"):
        assert choose(op, ARGS).backend == "reference"
    assert "cosine_max: cpu: wants float16, got torch.float32" in caplog.text


def test_a_kernel_for_another_device_is_passed_over(op):
    offer("cuda", devices=("cuda",))
    assert choose(op, ARGS).backend == "reference"


def test_a_forced_backend_is_taken_and_released(op):
    offer("cpu")
    with ops.backend("reference"):
        assert choose(op, ARGS).backend == "reference"
    assert choose(op, ARGS).backend == "cpu"


def test_a_forced_backend_that_refuses_raises_with_the_reason(op):
    offer("cpu", refuse=lambda *_: "wants float16, got torch.float32")
    with ops.backend("cpu"), pytest.raises(KernelError, match=r"cpu: wants float16, got torch\.float32"):
        choose(op, ARGS)


def test_a_forced_backend_for_another_device_raises(op):
    offer("cuda", devices=("cuda",))
    with (
        ops.backend("cuda"),
        pytest.raises(RuntimeError, match="cuda: serves cuda, the arguments are on cpu"),
    ):
        choose(op, ARGS)


def test_a_forced_backend_that_is_missing_says_why(op, monkeypatch):
    monkeypatch.setitem(registry.MISSING, "cuda", "no driver")
    with ops.backend("cuda"), pytest.raises(RuntimeError, match="cuda: no driver"):
        choose(op, ARGS)


def test_the_environment_forces_a_backend(op, monkeypatch):
    offer("cpu")
    monkeypatch.setenv("DINOFAST_BACKEND", "reference")
    assert choose(op, ARGS).backend == "reference"
    monkeypatch.setenv("DINOFAST_BACKEND", "gpu")
    with pytest.raises(InputError, match="DINOFAST_BACKEND=gpu: no such backend; one of cpu, cuda"):
        choose(op, ARGS)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'gpu'"), ops.backend("gpu"):
        pass


def test_offers_with_an_unknown_name_or_twice_are_refused(op):
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        offer("gpu")
    offer("cpu")
    with pytest.raises(ValueError, match="'cpu' already has a kernel"):
        offer("cpu")


def test_a_forced_backend_reaches_the_operator():
    with ops.backend("reference"):
        similarity, index = ops.cosine_max(*ARGS)
    assert similarity.tolist() == [1, 1, 1]
    assert index.tolist() == [0, 1, 2]


def test_a_bare_source_tree_says_what_to_do(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", absent)
    spec = importlib.util.spec_from_file_location("bare", dinofast.__file__)
    with pytest.raises(ImportError, match=r"this source tree is not installed; run pip install -e \."):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_importing_dinofast_does_not_import_torch():
    import subprocess
    import sys

    code = (
        "import dinofast, sys; assert 'torch' not in sys.modules; dinofast.ops; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("capturing", [False, True])
def test_weights_live_as_long_as_a_graph_that_reads_them(monkeypatch, capturing):
    class Weights:
        pass

    monkeypatch.setattr(registry, "_HELD", {})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    own, foreign = Weights(), Weights()
    with registry.keeping() as held:
        assert registry.kept(own) is own
    assert registry.kept(foreign) is foreign
    assert registry.kept(foreign) is foreign
    assert held == [own]
    assert list(registry._HELD.values()) == [foreign] * capturing
    gone = weakref.ref(own)
    del own, held
    assert gone() is None


def test_graphs_recorded_outside_keeping_hold_so_many_weights_and_no_more(monkeypatch):
    monkeypatch.setattr(registry, "_HELD", {})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    tables = [torch.zeros(i) for i in range(registry.MOST_HELD + 1)]
    for _ in range(2):
        for table in tables[:-1]:
            registry.kept(table)
    with pytest.raises(KernelError, match=r"64 tables .* outside dinofast\.ops\.keeping\(\), and another"):
        registry.kept(tables[-1])
    assert len(registry._HELD) == registry.MOST_HELD
    assert registry.kept(tables[3]) is tables[3]
    with ops.keeping() as held:
        assert registry.kept(tables[-1]) is tables[-1]
    assert held == tables[-1:]


def test_the_reference_keeps_its_weights_too():
    with registry.keeping() as held, ops.backend("reference"):
        ops.upsample_blur(torch.ones(1, 3, 4), (31, 29), sigma=1.5)
    assert [tuple(x.shape) for x in held] == [(31, 3), (29, 4)]


def test_weights_first_used_for_inference_serve_gradients():
    map = torch.rand(1, 3, 4)
    with torch.inference_mode():
        expected = resample(map, (23, 37), 1.5, "bilinear", "reflect")
    found = resample(map.requires_grad_(), (23, 37), 1.5, "bilinear", "reflect")
    found.sum().backward()
    assert torch.equal(found, expected)
    assert map.grad.sum().item() == pytest.approx(23 * 37, rel=1e-5)
