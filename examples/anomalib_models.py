"""anomalib's own PatchCore and AnomalyDINO, then the same models inside `patched()`."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import numpy as np
import torch
from side_by_side import compare, need

need(
    "anomalib wants packages beside torch; `make test-hosts` sets up .venv-hosts with all of them, then\n"
    ".venv-hosts/bin/python examples/anomalib_models.py",
    *("anomalib", "torchvision", "timm"),
)

warnings.filterwarnings("ignore")
library = torch.library.Library("torchvision", "DEF")  # which a CPU build of torch lacks
if not hasattr(torch.ops.torchvision, "nms"):
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from anomalib.models.image.anomaly_dino import torch_model as dino  # noqa: E402
from anomalib.models.image.patchcore.torch_model import PatchcoreModel  # noqa: E402

from dinofast.drop_in.anomalib import patched  # noqa: E402


def images(n: int, seed: int, side: int) -> torch.Tensor:
    """Draw images (n, 3, side, side)."""
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model: Any, side: int, ratio: float | None) -> list[Any]:
    """Fit on four images, select a coreset where the model has one, score one image."""
    model.train()
    model.memory_bank = torch.empty(0)
    model.embedding_store.clear()
    model(images(4, 1, side))
    model.eval()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - of anomalib's random projection
    model.fit() if ratio is None else model.subsample_embedding(ratio)
    found = model(images(1, 2, side))
    return [model.memory_bank, found.pred_score, found.anomaly_map]


def with_dinofast(call: Any) -> Any:
    """Run inside `patched()`."""
    with patched():
        return call()


torch.manual_seed(0)
patchcore = PatchcoreModel(["layer2", "layer3"], "resnet18", pre_trained=False)
compare(
    "PatchcoreModel, resnet18: coreset of 10 % of four images, then one image (224×224)",
    lambda: run(patchcore, 224, 0.1),
    lambda: with_dinofast(lambda: run(patchcore, 224, 0.1)),
)
extractor = dino.TimmFeatureExtractor
untrained = lambda **options: extractor(**options | {"pre_trained": False})  # noqa: E731 - no hub is needed
with mock.patch.object(dino, "TimmFeatureExtractor", untrained):
    anomaly_dino = dino.AnomalyDINOModel(encoder_name="vit_small_patch14_dinov2")
compare(
    "AnomalyDINOModel, ViT-S/14: bank of four images, then one image (224×224)",
    lambda: run(anomaly_dino, 224, None),
    lambda: with_dinofast(lambda: run(anomaly_dino, 224, None)),
)
