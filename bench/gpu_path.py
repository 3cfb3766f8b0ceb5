"""The whole path on a GPU at batch 1, from a resized uint8 image there to its map: eager and replayed."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from bench import gpu
from bench.shapes import unit_rows
from dinofast import backbone, models
from dinofast.capture import CudaRecorder
from dinofast.capture.path import Path
from dinofast.models.base import Model
from dinofast.types import Features

SIDE = 448
TOLERANCE = 1e-4
"""Between eager and replayed, of the largest value of the map."""


def _prototypes() -> Model:
    model = models.create("memory_bank", sigma=0.0)
    model.load_state({"bank": unit_rows(150, 0)})
    return model


def _spatial() -> Model:
    tokens = torch.randn(2, SIDE // 16, SIDE // 16, 384, generator=torch.Generator().manual_seed(0))
    return models.create("spatial_ar", n_epochs=1).fit([Features(tokens, None, (SIDE, SIDE))])


PATHS: dict[str, tuple[str, Callable[[], Model]]] = {
    "vits14_150_prototypes": ("random:dinov2-small", _prototypes),
    "vits16_spatial_ar": ("random:dinov3-vits16", _spatial),
}
"""Name -> backbone, and what makes the fitted model of its features."""


def measure(name: str, dtype: str, compile: bool) -> tuple[gpu.Times, float]:
    """Time a path eagerly and as `Detector.capture` records it, both past a comparison of their maps.

    Returns:
        Times, and the largest difference of the maps.
    """
    source, make = PATHS[name]
    network = backbone.load(source, size=SIDE, device="cuda", dtype=gpu.DTYPES[dtype], compile=compile)
    path = Path(network, make().to("cuda"), (SIDE, SIDE))
    draw = torch.Generator().manual_seed(0)
    rgb = torch.randint(256, (1, SIDE, SIDE, 3), dtype=torch.uint8, generator=draw).cuda()
    recorder = CudaRecorder(network.device)
    with recorder.aside():
        path(rgb)
        path.check(rgb)
    recording = recorder.record(path, (rgb,))
    eager: Tensor = path(rgb)[1]
    recording.replay()
    difference = float((recording.outputs[1] - eager).abs().max())
    assert difference <= TOLERANCE * float(eager.abs().max()), (
        f"{name}: replayed maps differ by {difference:.3g}"
    )
    peak = gpu._peak_extra(lambda: path(rgb))
    samples = gpu._samples(lambda: path(rgb))
    replayed = statistics.median(gpu._samples(recording.replay))
    return gpu.Times(statistics.median(samples), samples, replayed, "", peak), difference
