"""One image from file to map, by stage; from features to patch scores; one step of the mixture's fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.dpmm import step_calls, step_error
from bench.measure import OURS, PEER_TOLERANCE, Group, Measure
from bench.memory import peak_extra
from bench.shapes import D
from dinofast import Detector, backbone, models, ops
from dinofast.data import demo
from dinofast.models.raster_net import TAPS
from dinofast.types import Features, Prediction

BACKBONES = ("efficientnet-lite0", "random:dinov2-small")


@pytest.mark.parametrize("name", BACKBONES)
def bench_detector_predict(measure: Measure, name: str) -> None:
    measure("Detector.predict brain_slice", name, _prepare)


def _prepare() -> Group:
    """Fit each on six normal slices, and predict one with a lesion at batch 1, read anew each time."""
    brain = demo.brain()
    group = Group({}, {})
    for name in BACKBONES:
        detector = Detector(backbone.load(name, device="cpu")).fit(brain.fit[:6])

        def predict(detector: Detector = detector) -> Prediction:
            [prediction] = detector.predict(brain.test[3:4], batch_size=1)
            return prediction

        def stages(detector: Detector = detector) -> dict[str, float]:
            return detector.seconds

        with ops.backend("reference"):
            expected = predict()
        assert bool(torch.isfinite(expected.map).all()), f"{name}: the map is not finite"
        error = (predict().map - expected.map).abs().max().item()
        assert error <= 1e-4, f"{name}: the map differs by {error:.3g} from the reference backend's"
        group.calls[name] = predict
        group.stages[name] = stages
        group.facts[name] = {"device": "cpu", "dtype": "float32", "largest_error": error}
    return group


@pytest.mark.parametrize("name", [OURS, "torch"])
def bench_spatial_ar(measure: Measure, name: str) -> None:
    measure("SpatialAR.patch_scores image_28x28", name, _prepare_spatial_ar)


def _prepare_spatial_ar() -> Group:
    """Score one map by the published network, and by convolutions with masks multiplied in beforehand."""
    draw = torch.Generator().manual_seed(0)
    tensor = torch.randn(1, 28, 28, D, generator=draw)
    model = models.create("spatial_ar", n_epochs=1, batch_size=1).fit([Features(tensor, None, (448, 448))])
    state, features = model.state(), Features(tensor, None, (448, 448))
    kernels, biases = [], []
    for i in range(5):
        weight = state[f"forward.{i}.weight"]
        kernel = torch.zeros(*weight.shape[:0:-1], 3, 3)
        for (dy, dx), matrix in zip(TAPS["causal"][i > 0], weight, strict=True):
            kernel[:, :, dy + 1, dx + 1] = matrix.T
        kernels.append(kernel)
        biases.append(state[f"forward.{i}.bias"])

    @torch.no_grad()
    def convolved(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        y = x
        for i, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
            y = torch.nn.functional.conv2d(y, kernel.to(dtype), bias.to(dtype), padding=4, dilation=4)
            y = y.relu_() if i < 4 else y
        return y.sub_(x).square_().mean(dim=1)

    image = tensor.permute(0, 3, 1, 2).contiguous()
    calls = {OURS: lambda: model.patch_scores(features), "torch": lambda: convolved(image)}
    truth = convolved(image.double(), torch.float64)
    group = Group(dict(calls), {})
    for name, call in calls.items():
        error = (call() - truth).abs().max().item()
        assert error <= 1e-5 * truth.max().item(), f"{name} errs by {error:.3g}"
        group.facts[name] = {
            "device": "cpu",
            "dtype": "float32",
            "backend": "torch",
            "largest_error": error,
            "flops": 2 * 28 * 28 * sum(t.numel() for n, t in state.items() if n.endswith("weight")),
            "bytes": 4 * (tensor.numel() + 28 * 28 + sum(t.numel() for t in state.values())),
        }
    return group


@pytest.mark.parametrize("contender", ["dinofast", "dinofast-kernel-alone", "torch"])
def bench_dpmm_step(measure: Measure, with_memory: bool, contender: str) -> None:
    measure("DPMM.step batch_12288x500_diag", contender, lambda: _prepare_step(with_memory))


def _prepare_step(with_memory: bool) -> Group:
    """Make one step of fit on twelve images: rows read from the store, statistics, update."""
    calls = step_calls()
    facts: dict[str, dict[str, Any]] = {
        name: {"backend": "cpu" if name.startswith(OURS) else name, "device": "cpu", "dtype": "float32"}
        for name in calls
    }
    for name in ("dinofast", "torch"):
        error = step_error(calls[name]())
        assert error <= PEER_TOLERANCE, f"{name}: a parameter errs by {error:.3g}"
        facts[name]["largest_error"] = error
    if with_memory:
        for name in calls:
            facts[name]["peak_extra_bytes"] = peak_extra("DPMM.step", "batch_12288x500_diag", name)
    return Group(calls, facts)
