"""The dispatcher: forced backends, refusals with reasons, an unknown name."""

import importlib.util
import logging
import weakref
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch

import dinofast
from dinofast import ops
from dinofast.errors import InputError, KernelError
from dinofast.info import info
from dinofast.ops import providers, registry
from dinofast.ops.providers import gpu
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


def test_a_kernel_that_yields_serves_when_only_the_reference_is_left(op):
    def refuse_huge(features, _):
        return "wants fewer rows" if len(features) > 3 else None

    yields = {"yields": lambda *_: "tensor cores are faster"}
    provide("cosine_max", Kernel("cuda", ("cpu",), lambda *_: ("cuda", None), **yields))
    assert choose(op, ARGS).backend == "cuda"
    offer("triton", refuse=refuse_huge)
    assert choose(op, ARGS).backend == "triton"
    assert choose(op, (torch.eye(4), torch.eye(4))).backend == "cuda"
    with ops.backend("cuda"):
        assert choose(op, ARGS).backend == "cuda"


@pytest.mark.parametrize(
    ("capability", "dtype", "backend"),
    [
        ((9, 0), torch.float32, "cuda"),
        ((9, 0), torch.bfloat16, "triton"),
        ((9, 0), torch.float16, "triton"),
        ((8, 6), torch.float16, "triton"),
        ((12, 0), torch.float32, "cuda"),
        ((7, 5), torch.float32, "reference"),
        ((7, 5), torch.bfloat16, "reference"),
    ],
)
def test_half_precision_goes_to_tensor_cores_and_old_gpus_to_the_reference(
    op, monkeypatch, capability, dtype, backend
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    built = (80, 90, 100)
    refuse_cuda = lambda x, *_: gpu.refuse_device(torch.device("cuda", 0), built)  # noqa: E731
    refuse_triton = lambda x, *_: providers.triton.refuse_device(torch.device("cuda", 0))  # noqa: E731
    yields = gpu.left_to_tensor_cores
    provide("cosine_max", Kernel("cuda", ("cpu",), lambda *_: None, refuse_cuda, yields))
    provide("cosine_max", Kernel("triton", ("cpu",), lambda *_: None, refuse_triton))
    args = tuple(x.to(dtype) for x in ARGS)
    assert choose(op, args).backend == backend
    if backend == "reference":
        with ops.backend("cuda"), pytest.raises(KernelError) as error:
            choose(op, args)
        assert "cuda: wants compute capability 8.0, 9.0, 10.0 or later" in str(error.value)
        assert "Tesla T4 has compute capability 7.5" in str(error.value)


@pytest.mark.parametrize(
    ("built", "served", "unserved"),
    [
        ((80, 90, 100), (80, 86, 89, 90, 100, 103, 120), (70, 75)),
        ((90,), (90, 100, 120), (75, 80, 89)),
        ((80, 100), (80, 89, 100, 120), (75, 90)),
        ((86,), (86, 89, 90), (80,)),
    ],
)
def test_a_build_serves_what_its_machine_code_and_ptx_run_on(monkeypatch, built, served, unserved):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some GPU")
    for arch in served + unserved:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, a=arch: divmod(a, 10))
        problem = gpu.refuse_device(torch.device("cuda", 0), built)
        assert (problem is None) == (arch in served), (arch, problem)


def test_info_tells_which_gpu_a_backend_does_not_serve(op, monkeypatch):
    offer("triton", devices=("cuda",))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda x: f"GPU of {x}")
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda x: (7, 5) if torch.device(x).index else (9, 0)
    )
    monkeypatch.setitem(registry.DEVICES, "triton", providers.triton.refuse_device)
    told = info()["backends"]
    assert told["reference"] == "found"
    assert told["triton"] == (
        "found; not on cuda:1: wants compute capability 8.0 or later, as Triton does; "
        "GPU of cuda:1 has compute capability 7.5"
    )


def test_triton_refuses_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    on_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    refuse = providers.triton.on_served_device(lambda *_: "not asked")
    assert "Tesla T4 has compute capability 7.5" in refuse(on_gpu)
    assert refuse(SimpleNamespace(is_cuda=False)) == "not asked"
    assert providers.coded_kernels(torch.device("cuda", 0)) is None


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
