"""Print what embedding and scoring a batch really take: python measured_peak.py DETECTOR H W BATCH.

With a model alone, print what its first search takes, which prepares its bank: python measured_peak.py MODEL.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from dinofast import Detector, models
from dinofast.types import Features


def resident(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def peak(call: Callable[[], object], first: bool = True) -> int:
    """The second call's, where `first` fills caches."""
    if first:
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


def searching(path: str) -> None:
    def search(model: Any) -> None:
        model._distance(torch.randn(1024, model.n_channels))

    few = models.create("memory_bank")
    few.load_state({"bank": F.normalize(torch.randn(5000, 232), dim=1)})
    model = models.load(path)
    search(few)  # sets the libraries up
    print(json.dumps(peak(lambda: search(model), first=False)))


if __name__ == "__main__" and len(sys.argv) == 2:
    searching(sys.argv[1])
elif __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
