"""Ways to run a network: lower precision, modes of torch.compile, TensorRT by a stand-in for its package."""

from __future__ import annotations

import importlib
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from dinofast.backbone import compiled, load
from dinofast.backbone.compiled import LEAST_COSINE, MODES, lowest_cosine, probe
from dinofast.errors import BackboneError, InputError

NAME = "random:dinov2-small"


class StandIn:
    """Compiles to the network itself, whose tokens a test may spoil; counts and keeps what it was asked."""

    def __init__(self, spoil: Any = lambda patches, cls: (patches, cls)) -> None:
        self.asked: list[tuple[tuple[int, ...], dict[str, Any]]] = []
        self.spoil = spoil

    def compile(self, network: Any, **options: Any) -> Any:
        pixels, _ = options["arg_inputs"]
        self.asked.append((tuple(pixels.shape), options))
        return lambda pixels, position: self.spoil(*network(pixels, position))


def use(monkeypatch: pytest.MonkeyPatch, stand_in: StandIn) -> StandIn:
    monkeypatch.setattr(compiled, "TENSORRT_DEVICES", ("cpu", "cuda"))
    monkeypatch.setitem(sys.modules, "torch_tensorrt", SimpleNamespace(compile=stand_in.compile))
    return stand_in


def turned(patches: torch.Tensor, cosine: float) -> torch.Tensor:
    """Turn the last token away until its cosine with itself is this."""
    token = patches[0, -1, -1]
    other = torch.randn(token.shape, generator=torch.Generator().manual_seed(1))
    other -= (other @ token) / (token @ token) * token
    spoiled = patches.clone()
    spoiled[0, -1, -1] = cosine * token + (1 - cosine**2) ** 0.5 * other * (token.norm() / other.norm())
    return spoiled


# Lower precision


def test_bfloat16_tells_its_lowest_cosine() -> None:
    full = load(NAME, device="cpu", size=70)
    half = load(NAME, device="cpu", size=70, dtype=torch.bfloat16)
    assert full.lowest_cosine is None
    assert "cosine" not in full.describe()
    pixels = probe((1, 3, 70, 70))
    tokens, truth = half(pixels).tensor.double(), full(pixels).tensor.double()
    expected = min(
        float((a @ b) / (a.norm() * b.norm()))
        for a, b in zip(tokens.view(-1, 384), truth.view(-1, 384), strict=True)
    )
    assert half.lowest_cosine is not None
    assert half.lowest_cosine <= expected + 1e-7  # class tokens count too
    assert half.lowest_cosine == pytest.approx(expected, abs=2e-3)
    assert 0.99 < half.lowest_cosine < 0.999999
    assert (
        f"bfloat16 on cpu, eager, lowest token cosine to float32 {half.lowest_cosine:.6f}" in half.describe()
    )


def test_a_precision_that_spoils_tokens_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    own = load("efficientnet-lite0", size=64, device="cpu")
    first = next(own.network.parameters())
    with torch.no_grad():
        first.mul_(1e30)  # beyond the range of float16
    with caplog.at_level(logging.WARNING, "dinofast"):
        own.lower(torch.float16)
    assert own.lowest_cosine != own.lowest_cosine
    assert "efficientnet-lite0 in float16: the lowest cosine of a token to float32 is nan" in caplog.text


def test_the_lowest_cosine_is_that_of_the_worst_token() -> None:
    patches, cls = torch.randn(2, 3, 4, 16), torch.randn(2, 16)
    assert lowest_cosine((patches, cls), (patches, cls)) == pytest.approx(1, abs=1e-6)
    assert lowest_cosine((turned(patches, 0.3), None), (patches, None)) == pytest.approx(0.3, abs=1e-6)
    assert lowest_cosine((patches, -cls), (patches, cls)) == pytest.approx(-1, abs=1e-6)
    broken = patches.clone()
    broken[1, 2, 3, 4] = torch.inf
    for found in ((broken, cls), (patches, None), (patches[:1], cls)):
        wrong = lowest_cosine(found, (patches, cls))
        assert wrong != wrong


# TensorRT


def test_tensorrt_is_named_with_its_extra_when_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "TENSORRT_DEVICES", ("cpu", "cuda"))
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(BackboneError, match=r"needs torch_tensorrt .*pip install 'dinofast\[tensorrt\]'"):
        load(NAME, device="cpu", size=70, compile="tensorrt")


def test_tensorrt_whose_library_is_missing_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, StandIn())

    def broken(name: str) -> Any:
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(BackboneError, match=r"needs torch_tensorrt \(libnvinfer.*choose compile='default'"):
        compiled.Engines(torch.nn.Identity())


@pytest.mark.parametrize("error", [RuntimeError("unsupported"), KeyError("node"), TypeError("dtype")])
def test_whatever_the_compiler_raises_has_a_remedy(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    stand_in = use(monkeypatch, StandIn())

    def fail(network: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(sys.modules["torch_tensorrt"], "compile", fail)
    words = rf"cannot build an engine .*\({type(error).__name__}: .*choose compile='default'"
    with pytest.raises(BackboneError, match=words):
        load(NAME, device="cpu", size=70, compile="tensorrt")
    assert not stand_in.asked


def test_tensorrt_on_a_cpu_is_refused() -> None:
    with pytest.raises(InputError, match="compile='tensorrt' needs an NVIDIA GPU, and the device is cpu"):
        load(NAME, device="cpu", size=70, compile="tensorrt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engines_that_agree_are_used_one_a_shape(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    stand_in = use(monkeypatch, StandIn())
    backbone = load(NAME, device="cpu", size=70, compile="tensorrt", dtype=dtype)
    assert "compiled (tensorrt)" in backbone.describe()
    assert [shape for shape, _ in stand_in.asked] == [(1, 3, 70, 70)]
    plain = load(NAME, device="cpu", size=70, dtype=dtype)
    for shape in ((1, 3, 70, 70), (2, 3, 70, 84), (2, 3, 70, 84), (1, 3, 70, 70)):
        pixels = torch.randn(shape)
        torch.testing.assert_close(backbone(pixels).tensor, plain(pixels).tensor, rtol=0, atol=0)
    assert [shape for shape, _ in stand_in.asked] == [(1, 3, 70, 70), (2, 3, 70, 84)]
    assert all(options["arg_inputs"][0].dtype == dtype for _, options in stand_in.asked)


@pytest.mark.parametrize("cosine", [0.5, 0.9985])
def test_an_engine_with_one_wrong_token_is_never_used(monkeypatch: pytest.MonkeyPatch, cosine: float) -> None:
    use(monkeypatch, StandIn(lambda patches, cls: (turned(patches, cosine), cls)))
    with pytest.raises(
        BackboneError, match=rf"smallest cosine of a token is {cosine:.6f}, below {LEAST_COSINE}"
    ):
        load(NAME, device="cpu", size=70, compile="tensorrt")


def test_class_tokens_and_nan_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, StandIn(lambda patches, cls: (patches, cls.roll(1, 1))))
    with pytest.raises(BackboneError, match="smallest cosine of a token is"):
        load(NAME, device="cpu", size=70, compile="tensorrt")
    use(monkeypatch, StandIn(lambda patches, cls: (patches * torch.nan, cls)))
    with pytest.raises(BackboneError, match="smallest cosine of a token is nan"):
        load(NAME, device="cpu", size=70, compile="tensorrt")


def test_a_later_shape_is_judged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(patches: torch.Tensor, cls: torch.Tensor) -> Any:
        return (turned(patches, 0.9) if patches.shape[2] > 5 else patches), cls

    use(monkeypatch, StandIn(spoil))
    backbone = load(NAME, device="cpu", size=70, compile="tensorrt")
    backbone(torch.randn(1, 3, 70, 70))
    for _ in range(2):
        with pytest.raises(BackboneError, match=r"pixels \(1, 3, 70, 84\) .* is 0.9000"):
            backbone(torch.randn(1, 3, 70, 84))


def test_modes_are_spelled_once() -> None:
    with pytest.raises(InputError, match=", ".join(MODES)):
        load(NAME, device="cpu", compile="fastest")


def test_a_probe_is_the_same_again_and_differs_by_image() -> None:
    one, again = probe((2, 3, 56, 70)), probe((2, 3, 56, 70))
    assert torch.equal(one, again)
    assert F.cosine_similarity(one[0].flatten(), one[1].flatten(), dim=0) < 0.9


@pytest.mark.needs_cuda
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "tensorrt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_modes_agree_with_the_network_on_a_gpu(mode: str, dtype: torch.dtype) -> None:
    eager = load(NAME, device="cuda", size=224, dtype=dtype, compile=False)
    fast = load(NAME, device="cuda", size=224, dtype=dtype, compile=mode)
    for shape in ((1, 3, 224, 224), (2, 3, 224, 224)):
        pixels = probe(shape)
        found, truth = (one(pixels) for one in (fast, eager))
        assert lowest_cosine((found.tensor, found.cls), (truth.tensor, truth.cls)) > 0.999


@pytest.mark.needs_cuda
def test_tensorrt_itself() -> None:
    pytest.importorskip("torch_tensorrt")
    pixels = probe((1, 3, 224, 224))
    found, truth = (load(NAME, device="cuda", size=224, compile=c)(pixels) for c in ("tensorrt", False))
    assert lowest_cosine((found.tensor, found.cls), (truth.tensor, truth.cls)) >= LEAST_COSINE
