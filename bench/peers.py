"""Who is timed: dinofast and, for each operator, the best plain way that other libraries offer.

A peer gets every advantage: rows of norm 1 that it need not normalise, an index that is already built, views
instead of copies. `prepare` does that work and is not timed.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.measure import Call
from dinofast.testing import as_tuple


@dataclass(frozen=True)
class Contender:
    """One way to compute an operator.

    Attributes:
        name: column of the table.
        prepare: takes the operator's arguments, gives the call that is timed.
        read: turns what the call returns into the operator's first results, for the gate; not timed.
        needs: package without which it is left out.
    """

    name: str
    prepare: Callable[..., Call]
    read: Callable[[Any], tuple[Tensor, ...]] = as_tuple
    needs: str = "torch"


OURS = "dinofast"


def contenders(op: str) -> list[Contender]:
    """Give dinofast and the peers of an operator that are installed, in the order of the table."""

    def prepare(*args: Any) -> Call:
        return partial(getattr(torch.ops.dinofast, op).default, *args)

    found = [peer for peer in PEERS[op] if importlib.util.find_spec(peer.needs)]
    return [Contender(OURS, prepare), *found]


def _torch_max(features: Tensor, prototypes: Tensor) -> Call:
    return lambda: (features @ prototypes.T).max(dim=1)


def _numpy_max(features: Tensor, prototypes: Tensor) -> Call:
    x, p = features.numpy(), prototypes.numpy()

    def call() -> Any:
        similarity = x @ p.T
        index = similarity.argmax(axis=1)
        return np.take_along_axis(similarity, index[:, None], axis=1), index

    return call


def _faiss(kind: str) -> Callable[..., Call]:
    def prepare(queries: Tensor, bank: Tensor, k: int = 1, metric: str = "cosine") -> Call:
        import faiss

        index = getattr(faiss, kind)(bank.shape[1])
        index.add(bank.numpy())
        return partial(index.search, queries.numpy(), k)

    return prepare


def _torch_topk(queries: Tensor, bank: Tensor, k: int, metric: str) -> Call:
    return lambda: (queries @ bank.T).topk(k, dim=1)


def _torch_products(
    x: Tensor, means: Tensor, precisions: Tensor, log_weights: Tensor, covariance_type: str
) -> Call:
    """Take an E and an M step as four float32 matrix products and a softmax."""

    def call() -> Any:
        log_det = precisions.log().sum(1) - means.shape[1] * math.log(2 * math.pi)
        constant = log_weights + 0.5 * (log_det - (means.square() * precisions).sum(1))
        squares = x.square()
        log_joint = constant + x @ (means * precisions).T - 0.5 * (squares @ precisions.T)
        r = log_joint.softmax(dim=1)
        return log_joint.logsumexp(dim=1), r.sum(0), r.T @ x, r.T @ squares

    return call


def _torch_scipy(map: Tensor, size: list[int], sigma: float, mode: str, boundary: str) -> Call:
    from scipy.ndimage import gaussian_filter

    def call() -> Any:
        pixels = torch.nn.functional.interpolate(map[:, None], size=size, mode=mode)
        return [gaussian_filter(image[0].numpy(), sigma) for image in pixels]

    return call


def _opencv(map: Tensor, size: list[int], sigma: float, mode: str, boundary: str) -> Call:
    import cv2

    images, side, (height, width) = list(map.numpy()), 2 * int(4 * sigma + 0.5) + 1, size

    def call() -> Any:
        resized = [cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR) for image in images]
        return [cv2.GaussianBlur(m, (side, side), sigma, borderType=cv2.BORDER_REFLECT) for m in resized]

    return call


def _first(raw: Any) -> tuple[Tensor, ...]:
    return (torch.as_tensor(raw[0]).flatten(),)


def _images(raw: Any) -> tuple[Tensor, ...]:
    return (torch.stack([torch.as_tensor(image) for image in raw]),)


PEERS: dict[str, list[Contender]] = {
    "cosine_max": [
        Contender("torch", _torch_max, _first),
        Contender("numpy", _numpy_max, _first, "numpy"),
        Contender("faiss-ip", _faiss("IndexFlatIP"), _first, "faiss"),
        Contender("faiss-l2", _faiss("IndexFlatL2"), lambda raw: (1 - _first(raw)[0] / 2,), "faiss"),
    ],
    "knn_topk": [
        Contender("torch", _torch_topk, lambda raw: (1 - raw[0],)),
        Contender("faiss-ip", _faiss("IndexFlatIP"), lambda raw: (1 - torch.as_tensor(raw[0]),), "faiss"),
    ],
    "dpm_stats": [Contender("torch", _torch_products, tuple)],
    "upsample_blur": [
        Contender("torch+scipy", _torch_scipy, _images, "scipy"),
        Contender("opencv", _opencv, _images, "cv2"),
    ],
}
"""Operator -> the others."""
