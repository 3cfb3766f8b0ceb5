"""The path that is recorded: from resized uint8 images to scores and maps, without a look at any value."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dinofast.backbone import Backbone
from dinofast.backbone.compiled import OWN_GRAPHS
from dinofast.backbone.preprocess import normalize, patch_gray
from dinofast.capture.static import StaticOnly
from dinofast.errors import InputError
from dinofast.models.base import Model, broken_tokens
from dinofast.ops.registry import static
from dinofast.types import Features


class Path:
    """Pixels to scores, as `Detector.predict` computes them, for images of one size.

    Args:
        backbone: as fitted.
        model: fitted, on its device.
        size: (H, W) of the maps.

    Raises:
        InputError: the model waits for values, or the backbone records graphs of its own; it says what to
            choose instead.
    """

    def __init__(self, backbone: Backbone, model: Model, size: tuple[int, int]) -> None:
        if (reason := model.waits_for()) is not None:
            raise InputError(f"{model!r} cannot be captured: {reason}.")
        if backbone.compile_mode in OWN_GRAPHS:
            raise InputError(
                f"{backbone.id} is compiled with compile={backbone.compile_mode!r}, which records graphs of "
                "its own; load it with compile='default' or compile=False to capture."
            )
        self._backbone, self._model, self._size = backbone, model, size
        levels = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2)
        self._levels = normalize(levels).flatten().to(backbone.device)
        self._channels = (256 * torch.arange(3, dtype=torch.int32))[:, None, None].to(backbone.device)

    def __call__(self, rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score images.

        Args:
            rgb: what `Preprocess.resized` gave of each, (B, H', W', 3), uint8, on the device.

        Returns:
            Image scores (B,), maps (B, H, W), float32, and how many tokens that the model reads are NaN or
            infinite of each image, (B,), int64.
        """
        return self._scored(self._features(rgb))

    def check(self, rgb: Tensor) -> None:
        """Run once more, after a call that filled all caches, and refuse whatever waits for a value.

        Raises:
            InputError: naming the operation.
        """
        watch = StaticOnly(repr(self._model))
        if self._backbone.compile_mode is None:
            with static(), watch:
                self(rgb)
            return
        features = self._features(rgb)  # the compiler must not see the watch
        with static(), watch:
            self._scored(features)

    @torch.no_grad()
    def _features(self, rgb: Tensor) -> Features:
        pixels = self._pixels(rgb)
        features: Features = replace(self._backbone(pixels), image_size=self._size)
        if not self._model.wants_intensity:
            return features
        h, w = features.tensor.shape[1:3]
        return replace(features, intensity=patch_gray(pixels, (h, w)))

    def _pixels(self, rgb: Tensor) -> Tensor:
        """Look every level up: the same bits as `normalize` on the host, (B, 3, H', W')."""
        index = rgb.permute(0, 3, 1, 2).int() + self._channels
        return self._levels.index_select(0, index.flatten()).view(index.shape)

    @torch.no_grad()
    def _scored(self, features: Features) -> tuple[Tensor, Tensor, Tensor]:
        scores = self._model.score_unseen(features)
        judged = features if self._model.wants_cls else replace(features, cls=None)
        return scores.score, scores.map, broken_tokens(judged)
