"""Every model on real labeled images: how well it separates, how long it takes and how large it is.

`python -m bench.real --out bench/results/real-2-cores.json` runs each model on each packaged set in a process
of its own, beside a plain nearest-neighbor script on the same features, and prints a Markdown table. Results
are written after each run; `--only NAME` (repeatable) restricts models, `--sets NAME` the sets. Images are
squashed to the backbone's square: slices of Br35H differ in shape, and their patches in scale otherwise.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpuinfo import get_cpu_info

from bench.memory import resident
from dinofast import Detector, backbone, metrics, models, trial
from dinofast.data import packaged
from dinofast.data.split import SplitSet
from dinofast.files import replacing
from dinofast.stream import Embedder

SCRIPT = "k-NN script"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "memory_bank": ("memory_bank", {}),
    "patchcore": ("patchcore", {}),
    "dpmm": ("dpmm", {}),
    "support_kmeans": ("support_kmeans", {"match_descriptor": "mean_patch"}),
    "spatial_ar": ("spatial_ar", {}),
}
"""Row of the table -> model and parameters, the same on every set."""
BACKBONE, TIMING_BACKBONE = "efficientnet-lite0", "random:dinov2-small"


def run(set_name: str, row: str, backbone_name: str) -> dict[str, Any]:
    """Fit and test one model on one set in this process."""
    images = packaged.load(set_name)
    features = backbone.load(backbone_name, device="cpu", resize="squash")
    found = script(images, features) if row == SCRIPT else system(images, features, row)
    facts = {"set": set_name, "row": row, "backbone": backbone_name, "n_fit": len(images.fit)}
    return {**facts, "n_test": len(images.test), "peak_bytes": resident("VmHWM"), **found}


def system(images: SplitSet, features: backbone.Backbone, row: str) -> dict[str, Any]:
    """Run one of dinofast's models."""
    name, params = MODELS[row]
    found = trial.run(Detector(features, models.create(name, **params)), images)
    return {
        "level": found.level,
        "auroc": found.ranking.auroc,
        "aupr": found.ranking.aupr,
        "fit_seconds": found.fit_seconds,
        "fit_model_seconds": found.fit_model_seconds,
        "seconds_per_image": found.evaluation.seconds,
        "model_bytes": found.model_bytes,
    }


def script(images: SplitSet, features: backbone.Backbone) -> dict[str, Any]:
    """Run what anyone would write first: 8000 random normal patches, cosine distance, mean of the top 8."""
    embedder = Embedder(features)
    start = time.perf_counter()
    rows = torch.cat([b.features.tensor.flatten(0, 2) for b in embedder.batches(images.fit, "fit")])
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:8000]
    bank = torch.nn.functional.normalize(rows[chosen])
    fit_seconds = time.perf_counter() - start
    embedder.restart()
    scores, pixels, truth = [], [], []
    for sample, batch in zip(images.test, embedder.batches(images.test, "test", 1), strict=True):
        start = time.perf_counter()
        tokens = torch.nn.functional.normalize(batch.features.tensor[0], dim=-1)
        distance = 1 - (tokens.flatten(0, 1) @ bank.T).max(dim=1).values
        scores.append(float(distance.topk(8).values.mean()))
        mask = sample.mask()
        if mask is not None:
            grid = distance.view(1, 1, *tokens.shape[:2])
            map = torch.nn.functional.interpolate(grid, mask.shape, mode="bilinear")[0, 0].numpy()
            inside = images.region(sample)
            pixels.append(map.ravel() if inside is None else map[inside])
            truth.append(mask.ravel() if inside is None else mask[inside])
        embedder.timed("model", start)
    level = "pixel" if pixels else "image"
    values = np.concatenate(pixels) if pixels else np.array(scores)
    labels = np.concatenate(truth) if pixels else np.array([s.label for s in images.test], bool)
    return {
        "level": level,
        "auroc": metrics.auroc(values, labels),
        "aupr": metrics.aupr(values, labels),
        "fit_seconds": fit_seconds,
        "fit_model_seconds": None,
        "seconds_per_image": embedder.per_image(),
        "model_bytes": bank.nbytes,
    }


def table(runs: Iterable[dict[str, Any]]) -> str:
    """Give the Markdown table of runs."""
    lines = [
        "| Set | Model | AUROC | AUPR | Fit | Model's share of an image | Size | Peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        real = not r["backbone"].startswith("random:")
        quality = [f"{r['auroc']:.3f}", f"{r['aupr']:.3f}"] if real else ["", ""]
        name = r["row"] if real else f"{r['row']}, {r['backbone'].split(':')[1]} size"
        spent = r["seconds_per_image"]
        lines.append(
            f"| {r['set']} ({r['level']}) | {name} | {' | '.join(quality)} | {r['fit_seconds']:.1f} s | "
            f"{1e3 * spent['model']:.2f} of {1e3 * sum(spent.values()):.1f} ms | "
            f"{r['model_bytes'] / 2**20:.2f} MiB | {r['peak_bytes'] / 2**20:.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all asked for, each in a fresh process."""
    parser = argparse.ArgumentParser(prog="python -m bench.real", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--sets", action="append", choices=packaged.NAMES)
    parser.add_argument("--only", action="append", choices=[SCRIPT, *MODELS])
    parser.add_argument(
        "--timing", action="store_true", help=f"also run on {TIMING_BACKBONE}, without scores"
    )
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(run(*asked.one)))
        return
    runs = []
    for backbone_name in (BACKBONE, *([TIMING_BACKBONE] if asked.timing else [])):
        for set_name in asked.sets or packaged.NAMES:
            for row in asked.only or [SCRIPT, *MODELS]:
                command = [sys.executable, "-m", "bench.real", "--one", set_name, row, backbone_name]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
                print(table(runs[-1:]).splitlines()[-1], flush=True)
                if asked.out:
                    about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
                    about |= {"machine": platform.machine(), "python": platform.python_version()}
                    about["cpu"] = get_cpu_info().get("brand_raw", platform.machine())
                    with replacing(asked.out) as path:
                        path.write_text(json.dumps({"about": about, "runs": runs}, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
