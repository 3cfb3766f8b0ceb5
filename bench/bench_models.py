"""One image from file to anomaly map, by stage."""

from __future__ import annotations

import pytest
import torch

from bench.measure import Group, Measure
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
