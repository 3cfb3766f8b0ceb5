"""Print what embedding and scoring a batch really take: python measured_peak.py DETECTOR H W BATCH."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from dinofast import Detector
from dinofast.types import Features


def resident(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def peak(call: Callable[[], object]) -> int:
    """The second call's; the first fills caches."""
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def main(path: str, height: int, width: int, batch: int) -> None:
    detector = Detector.load(path, device="cpu")
    shape = (batch, 3, *detector.backbone.preprocess.cropped_size(height, width))

    def features() -> Features:
        return detector.backbone(torch.randn(shape))

    found = replace(features(), image_size=(height, width))
    if detector.model.wants_intensity:
        found = replace(found, intensity=torch.rand(found.tensor.shape[:3]))
    score = lambda: detector.model.score(replace(found, tensor=found.tensor.clone()))  # noqa: E731
    print(json.dumps([peak(features), peak(score)]))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
