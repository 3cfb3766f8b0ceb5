"""One image from file to anomaly map, by stage; one step of the mixture's fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.dpmm import step_calls, step_error
from bench.measure import OURS, PEER_TOLERANCE, Group, Measure
from bench.memory import peak_extra
from dinofast import Detector, backbone, ops
from dinofast.data import demo
from dinofast.types import Prediction

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
