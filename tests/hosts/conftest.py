"""Host projects run here for real: torchvision needs two operator schemas that a CPU build of torch lacks."""

import torch

_LIBRARY = torch.library.Library("torchvision", "DEF")  # kept for the life of the process
if not hasattr(torch.ops.torchvision, "nms"):
    _LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
