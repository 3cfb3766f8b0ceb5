"""What a prediction will take in memory, told from the file alone: no image is scored, no GPU is touched.

The path runs on tensors without values; what they would take is added up as they come and go.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinofast import artifact, models
from dinofast import backbone as backbones
from dinofast.backbone import Backbone, saved
from dinofast.errors import ArtifactError, InputError
from dinofast.imaging import as_size
from dinofast.models.base import Model
from dinofast.ops.registry import OPS
from dinofast.types import Features

DEVICES = ("cpu", "cuda")
_EVERY_PATCH = {
    "masking": False,
    "mask_references": None,
    "foreground": "none",
    "mask_query_background": None,
}
"""Parameters without which a model scores every patch, by a path whose sizes do not depend on values."""


@dataclass(frozen=True)
class Plan:
    """Bytes of a prediction of one batch, eager.

    Attributes:
        source: the file.
        backbone: name of the backbone, in which precision.
        model: the model with its parameters.
        device: "cpu" or "cuda".
        size: (H, W) of the images.
        pixels: (H', W') of what the backbone sees.
        batch: images at a time.
        backbone_bytes: weights.
        model_bytes: what was learned.
        prepared_bytes: what the model prepares from it and keeps.
        preparing_bytes: peak beside what was learned while that is made, itself included.
        backbone_workspace: peak of activations beside the weights.
        model_workspace: peak while scoring: features, what the kernels allocate, maps.
        peak_bytes: weights, what was learned, and the larger of what was prepared with the larger workspace
            and of preparing it beside the features of a batch. The process itself, libraries and images that
            wait on the host come on top.
    """

    source: str
    backbone: str
    model: str
    device: str
    size: tuple[int, int]
    pixels: tuple[int, int]
    batch: int
    backbone_bytes: int
    model_bytes: int
    prepared_bytes: int
    preparing_bytes: int
    backbone_workspace: int
    model_workspace: int
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON types."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def plan(
    source: str | os.PathLike[str],
    size: tuple[int, int],
    batch: int = 1,
    *,
    backbone: Backbone | str | os.PathLike[str] | None = None,
    device: str | None = None,
) -> Plan:
    """Tell what scoring a batch will take in memory.

    Sizes that depend on values are taken at their largest: a model with a mask is taken to score every patch.
    Whether a CPU groups the rows of a bank is found from at most 16384 of them, which takes about a second
    and what a bank of those takes; where that leaves it open, they are taken to be grouped, which takes more.

    Tests hold what banks of both kinds hold to within a tenth of what is told. They hold runs on a CPU to at
    most 10/9 of either workspace told, and what is told to at most 1.5 times what a backbone takes and three
    times what a model does, but for a few MiB. Nothing was measured on a GPU.

    Args:
        source: a file that `Detector.save` or `Model.save` wrote; its tensors stay in the file.
        size: (H, W) of the images as they are read.
        batch: images at a time.
        backbone: of the fit, or where its weights are now; a model's file alone does not name it. It is
            loaded on the CPU; one that is passed is used up.
        device: "cpu" or "cuda", whose kernels allocate different workspaces; by default a GPU where there is
            one. Neither is used.

    Raises:
        InputError: no such file, a size that the backbone cannot take, no backbone for a model, or a backbone
            of another D.
        ArtifactError: torn, foreign or newer, or the backbone is not that of the fit.
        BackboneError: the backbone's weights are not there; pass `backbone`.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in DEVICES:
        raise InputError(f"unknown device {device!r}; one of {', '.join(DEVICES)}")
    if not isinstance(batch, int) or batch < 1:
        raise InputError(f"batch must be a whole number, at least 1, got {batch!r}")
    size = as_size(size)
    tensors, config = artifact.read(source, None, mapped=True)
    asked: dict[str, Any] = {}
    dtype = torch.float32
    if "backbone" in config:
        try:
            tensors = {name[6:]: t for name, t in tensors.items() if name.startswith("model.")}
            wanted, told, config = config["backbone"], config["backbone_source"], config["model"]
            asked = saved.options(wanted)
            dtype = backbones.DTYPES[backbones.DTYPES.index(asked.pop("dtype"))]
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{source}: does not hold together ({error}); save the detector again."
            ) from error
        backbone = told if backbone is None else backbone
    if backbone is None:
        raise InputError(f"{source} holds a model without its backbone; name that of the fit (--backbone).")
    model = models.restore(config, tensors)
    if not isinstance(backbone, Backbone):
        backbone = backbones.load(backbone, device="cpu", compile=False, **asked)
        backbone.to(dtype)  # `load` would hold it to float32 by a run
    if asked:
        saved.check_same(source, wanted, backbone.config)
    if backbone.dim != model.n_channels:
        raise InputError(
            f"{source}: fitted on D = {model.n_channels}, and {backbone.id} gives D = {backbone.dim}; name "
            "the backbone of the fit."
        )
    return _told(os.fspath(source), model, backbone, size, batch, device)


def _told(
    source: str, model: Model, backbone: Backbone, size: tuple[int, int], batch: int, device: str
) -> Plan:
    pixels = backbone.preprocess.cropped_size(*size)
    name = f"{backbone.id}, {str(backbone.dtype).removeprefix('torch.')}"
    weights = sum(x.nbytes for x in [*backbone.parameters(), *backbone.buffers()])
    prepared, preparing = model.prepared_bytes(device), model.preparing_bytes(device)
    mask = _mask_bytes(model, batch, pixels, backbone)
    backbone.position(*pixels)  # its values are needed once, and kept
    backbone, hollow = backbone.to("meta"), _every_patch(model).to("meta")
    with torch.no_grad(), _Flash(), _Counting(device) as counting:
        given = torch.empty(batch, 3, *pixels, device="meta")
        features: Features = backbone(given)
        embedding = counting.peak
        if model.wants_intensity:
            features = replace(features, intensity=features.tensor[..., 0].contiguous())
        del given
        counting.peak = found = counting.live
        finite = features.tensor.isfinite()
        del finite
        scores = hollow.score_unseen(replace(features, image_size=size))
        scoring = counting.peak + mask
        del features, scores
    learned = sum(tensor.nbytes for tensor in model.state().values())
    return Plan(
        source=source,
        backbone=name,
        model=repr(model),
        device=device,
        size=size,
        pixels=pixels,
        batch=batch,
        backbone_bytes=weights,
        model_bytes=learned,
        prepared_bytes=prepared,
        preparing_bytes=preparing,
        backbone_workspace=embedding,
        model_workspace=scoring,
        peak_bytes=weights + learned + max(prepared + max(embedding, scoring), preparing + found),
    )


def _every_patch(model: Model) -> Model:
    """Give a model of the same state that masks nothing."""
    params = model.params()
    changed = {name: value for name, value in _EVERY_PATCH.items() if name in params}
    if not changed:
        return model
    twin = type(model)(**params | changed)
    twin.load_state(model.state())
    return twin


def _mask_bytes(model: Model, batch: int, pixels: tuple[int, int], backbone: Backbone) -> int:
    """Count what a principal component takes: centered rows twice and a covariance thrice, in float64."""
    if model.waits_for() is None:
        return 0
    n, d = pixels[0] // backbone.patch_size * (pixels[1] // backbone.patch_size), backbone.dim
    return 16 * n * d + 24 * d * d + 17 * batch * n


class _Flash(TorchFunctionMode):
    """Attention as fused kernels do it, without the matrix of all pairs."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Give an empty result for attention; run everything else."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, _, value = args[:3] if len(args) > 2 else (kwargs[n] for n in ("query", "key", "value"))
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **kwargs)


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Add up the memory of tensors as they come and go.

    Attributes:
        live: bytes held now.
        peak: most of `live` with the workspace of a running operator.
    """

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._device = device
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and count what it made."""
        known = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        results = func(*args, **kwargs or {})
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._count(result.untyped_storage(), known)
        extra = 0
        if func.namespace == "dinofast":
            extra = OPS[func._schema.name.removeprefix("dinofast::")].workspace(self._device, *args)
        elif func._schema.name == "aten::convolution":  # copies in the layout that its kernels want
            extra = args[0].nbytes + results.nbytes
        self.peak = max(self.peak, self.live + extra)
        return results

    def _count(self, storage: Any, known: set[Any]) -> None:
        if storage in known or storage in self._known:
            return
        self._known.add(storage)
        self.live += storage.nbytes()
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self.live -= size
