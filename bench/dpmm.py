"""The fit of the mixture at the paper's size: one step, and a share of a fit to extrapolate from.

`python -m bench.dpmm` fits on 48 synthetic images of 1024 patches and prints JSON: the time of a step, what
40 epochs over 7500 images (7.68 million patches) would take, and the peak extra memory. CPU times are of all
threads together, and tell more than the others where the machine is not idle.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import Call
from bench.peers import contenders
from bench.shapes import SHAPES, D
from dinofast.models.dpmm import DPMM
from dinofast.models.feature_store import FeatureStore
from dinofast.models.mixture import Mixture, Rule, step, update
from dinofast.models.mixture import statistics as kernel
from dinofast.types import Features

SHAPE = "batch_12288x500_diag"
BATCH, SIDE = 12, 32
PAPER_IMAGES, PAPER_EPOCHS = 7500, 40
SETTLING = 6
"""Steps after which the time of a step has become that of a converged mixture."""


def step_calls() -> dict[str, Call]:
    """Give one step each: ours from the stored rows, our operator alone, the dense form with our update."""
    x, mixture, rule = _settled()
    store = FeatureStore.of([Features(x.view(BATCH, SIDE, SIDE, D), None, (448, 448))])
    log_weights = rule.log_weights(mixture.sticks)
    torch_peer = next(c for c in contenders("dpm_stats", SHAPE) if c.name == "torch")
    args = (mixture.means, mixture.covariances.reciprocal(), log_weights.float(), "diag")

    def dense() -> Mixture:
        _, *sums = torch_peer.prepare(store.rows(range(BATCH)), *args)()
        return update(mixture, *sums, len(x), rule)

    return {
        "dinofast": lambda: step(mixture, store.rows(range(BATCH)), rule)[0],
        "dinofast-kernel-alone": lambda: kernel(x, mixture.means, mixture.covariances, log_weights),
        "torch": dense,
    }


def step_error(found: Mixture) -> float:
    """Give the largest error of means and shares after a step, against the step of the float64 reference."""
    return max(
        float((got.double() - true).abs().max())
        for got, true in ((found.means, _truth().means), (found.mass, _truth().mass))
    )


@cache
def _settled() -> tuple[Tensor, Mixture, Rule]:
    """Give a batch of rows, a mixture that has made some steps on it, and the rule of its steps."""
    x = SHAPES["dpm_stats"][SHAPE]()[0]
    model = DPMM()
    mixture = model._start(x)
    for _ in range(SETTLING):
        mixture, _ = step(mixture, x, model._rule)
    return x, mixture, model._rule


@cache
def _truth() -> Mixture:
    x, mixture, rule = _settled()
    return step(mixture, x.double(), rule)[0]


def synthetic(images: int) -> Iterator[Features]:
    """Draw batches of twelve images of unit rows around 500 centers; each batch when it is asked for."""
    centers = torch.nn.functional.normalize(torch.randn(500, D, generator=torch.Generator().manual_seed(0)))
    for start in range(0, images, BATCH):
        draw = torch.Generator().manual_seed(1 + start)
        owner = torch.randint(500, (BATCH * SIDE * SIDE,), generator=draw)
        rows = centers[owner] + 0.03 * torch.randn(len(owner), D, generator=draw)
        yield Features(rows.view(BATCH, SIDE, SIDE, D), None, (448, 448))


def fit_share(images: int, epochs: int) -> dict[str, Any]:
    """Fit on a share of the paper's images and epochs; give what was measured and what it comes to."""
    ticks: list[tuple[float, float]] = []

    def tick(*_: object) -> None:
        ticks.append((time.perf_counter(), time.process_time()))

    began = time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    model = DPMM(n_epochs=epochs)
    ctypes.CDLL(None).malloc_trim(0)
    model.fit(synthetic(images), progress=tick)
    gaps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(ticks)][SETTLING:]
    wall, cpu = (statistics.median(gap) for gap in zip(*gaps, strict=True))
    steps = PAPER_EPOCHS * -(-PAPER_IMAGES // BATCH)
    return {
        "images": images,
        "epochs": epochs,
        "threads": torch.get_num_threads(),
        "steps_timed": len(gaps),
        "ms_per_step": 1e3 * wall,
        "cpu_ms_per_step": 1e3 * cpu,
        "seconds_until_first_step": ticks[0][0] - began,
        "hours_of_40_epochs_of_7500_images": steps * wall / 3600,
        "cpu_hours_of_40_epochs_of_7500_images": steps * cpu / 3600,
        "peak_extra_MiB": (_resident("VmHWM") - before) / 2**20,
        "mean_log_likelihood": model.lower_bound_,
        "active_components": int((model.weights_ > model.weight_threshold).sum()),
    }


def _resident(field: str) -> int:
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows[field].split()[0]) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=4)
    print(json.dumps(fit_share(**vars(parser.parse_args())), indent=1))
