"""Who is timed: dinofast and, for each operator, the best plain way that other libraries offer.

A peer gets every advantage: rows of norm 1 that it need not normalize, an index that is already built, views
instead of copies. `prepare` does that work and is not timed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.measure import OURS, PEER_TOLERANCE, Call
from dinofast.ops import MISSING, OPS, Bank, knn_topk
from dinofast.ops.dpm_stats import pairs_evaluated
from dinofast.ops.registry import choose
from dinofast.testing import as_tuple


@dataclass(frozen=True)
class Contender:
    """One way to compute an operator.

    Attributes:
        name: column of the table.
        prepare: takes the operator's arguments, gives the call that is timed.
        read: turns what the call returns into the operator's first results, for the gate; not timed.
        needs: package without which it is left out.
        only: pattern that the name of the size must hold, else it is left out.
        tell: takes a call that has run, gives what else is known of it, in JSON types.
        stages: takes a call that has run, gives the seconds of its parts.
    """

    name: str
    prepare: Callable[..., Call]
    read: Callable[[Any], tuple[Tensor, ...]] = as_tuple
    needs: str = "torch"
    only: str = ""
    tell: Callable[[Any], dict[str, Any]] = lambda _: {}
    stages: Callable[[Any], dict[str, float]] | None = None


def contenders(op: str, size: str = "") -> list[Contender]:
    """Give dinofast and the peers of an operator at a size that are installed, in the order of the table."""

    def prepare(*args: Any) -> Call:
        return partial(getattr(torch.ops.dinofast, op).default, *args)

    tell = _pairs if op == "dpm_stats" else Contender.tell
    found = [
        peer for peer in PEERS[op] if re.search(peer.only, size) and importlib.util.find_spec(peer.needs)
    ]
    stages = _native_steps if op == "dpm_stats" and size.endswith("_full") and "cpu" not in MISSING else None
    return [Contender(OURS, prepare, tell=tell, stages=stages), *found]


def has_compiler() -> bool:
    """Tell whether torch.compile can build CPU code here."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def _compiled(op: str, only: str) -> list[Contender]:
    """Let torch.compile fuse the reference; the first call, which the gate takes, compiles it.

    Inductor of torch 2.13 fails on the references of `upsample_blur` and `cosine_map` on the CPU.
    """

    def prepare(*args: Any) -> Call:
        return partial(torch.compile(OPS[op].reference, dynamic=False), *args)

    return [Contender("torch.compile", prepare, only=only)] if has_compiler() else []


def _pairs(call: Any) -> dict[str, Any]:
    native = choose(OPS["dpm_stats"], call.args).backend == "cpu"
    return {"pairs_evaluated": pairs_evaluated(*call.args)} if native else {}


def _native_steps(call: Any) -> dict[str, float]:
    """Take the steps of one more call: the operator does not tell them."""
    from dinofast.ops.providers.cpu import dpm_stats_native

    start = time.perf_counter()
    *_, expectation = dpm_stats_native(*call.args)
    return {"E step": expectation, "M step": time.perf_counter() - start - expectation}


def _bank(strategy: str) -> Callable[..., Call]:
    def prepare(queries: Tensor, bank: Tensor, k: int, metric: str) -> Call:
        return partial(knn_topk, queries, Bank(bank, metric, strategy), k, metric)

    return prepare


def _bank_facts(call: Any) -> dict[str, Any]:
    bank = call.args[1]
    names = ("strategy", "reason", "visited_share", "build_seconds", "nbytes")
    return {name: getattr(bank, name) for name in names}


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


def _anomalib(queries: Tensor, bank: Tensor, k: int, metric: str) -> Call:
    """Take the formula of anomalib's AnomalyDINO; its rows have norm 1 already."""
    return lambda: (1 - queries @ bank.T).clamp(0, 2).min(dim=1)


def _torch_opencv(features: Tensor, prototypes: Tensor, size: list[int], mask: None) -> Call:
    import cv2

    (images, h, w, d), (height, width) = features.shape, size

    def call() -> Any:
        rows = torch.nn.functional.normalize(features.view(-1, d))
        distance = (1 - (rows @ prototypes.T).max(dim=1).values).view(images, h, w).numpy()
        return [cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR) for image in distance]

    return call


def _torch_full(
    x: Tensor, means: Tensor, precisions: Tensor, log_weights: Tensor, covariance_type: str
) -> Call:
    """Take an E and an M step with one product a component each."""
    seconds: dict[str, float] = {}

    def call() -> Any:
        start = time.perf_counter()
        factor = torch.linalg.cholesky(precisions)
        constant = log_weights + factor.diagonal(dim1=1, dim2=2).log().sum(1)
        form = torch.stack([((x - m) @ f).square().sum(1) for m, f in zip(means, factor, strict=True)], 1)
        log_joint = constant - 0.5 * (form + x.shape[1] * math.log(2 * math.pi))
        log_likelihood, r = log_joint.logsumexp(dim=1), log_joint.softmax(dim=1)
        seconds["E step"] = time.perf_counter() - start
        second = torch.stack([(x * weight[:, None]).T @ x for weight in r.T])
        results = log_likelihood, r.sum(0), r.T @ x, second
        seconds["M step"] = time.perf_counter() - start - seconds["E step"]
        return results

    call.seconds = seconds  # type: ignore[attr-defined]
    return call


def _sklearn(x: Tensor, means: Tensor, precisions: Tensor, log_weights: Tensor, covariance_type: str) -> Call:
    """Take one iteration of its variational mixture, sure of its parameters: then it has these densities."""
    from sklearn.mixture import BayesianGaussianMixture

    rows, weights, sure = x.numpy(), log_weights.exp().numpy(), np.float32(1e12)
    rest = np.append(weights[::-1].cumsum()[-2::-1], np.float32(1e-6))
    model = BayesianGaussianMixture(n_components=len(weights), covariance_type=covariance_type)
    model._check_parameters(rows)

    def call() -> Any:
        model.means_, model.precisions_cholesky_ = means.numpy(), precisions.sqrt().numpy()
        model.weight_concentration_ = (sure * weights, sure * rest)
        model.degrees_of_freedom_ = model.mean_precision_ = np.full(len(weights), sure)
        log_likelihood, log_r = model._estimate_log_prob_resp(rows)
        model._m_step(rows, log_r)
        return log_likelihood, model.weight_concentration_[0] - 1

    return call


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


def _sklearn_lloyd(rows: Tensor, centers: Tensor) -> Call:
    """Take one iteration of its Lloyd algorithm, without what its KMeans does before and after."""
    from sklearn.cluster import _k_means_lloyd
    from threadpoolctl import ThreadpoolController

    x, n, k = rows.numpy(), *(len(t) for t in (rows, centers))
    before, ones, labels = centers.numpy(), np.ones(n, np.float32), np.full(n, -1, np.int32)
    after, count, shift = np.empty_like(before), np.empty(k, np.float32), np.empty(k, np.float32)
    step, threads = _k_means_lloyd.lloyd_iter_chunked_dense, torch.get_num_threads()
    pools = ThreadpoolController()

    def call() -> Any:
        with pools.limit(limits=1, user_api="blas"):  # as its KMeans does: the step has threads of its own
            step(x, ones, before, after, count, labels, shift, threads)
        return (labels,)

    return call


def _faiss_kmeans(rows: Tensor, centers: Tensor) -> Call:
    """Take one iteration of its Kmeans; it keeps the nearest centers to itself, so its means are checked."""
    import faiss

    x, start = rows.numpy(), centers.numpy()
    many = 1 + len(rows)

    def call() -> Any:
        kmeans = faiss.Kmeans(
            x.shape[1], len(start), niter=1, max_points_per_centroid=many, min_points_per_centroid=1
        )
        kmeans.train(x, init_centroids=start)
        return kmeans.centroids

    index = torch.cdist(rows, centers, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    sums = torch.zeros_like(centers).index_add_(0, index, rows)
    means = sums / torch.bincount(index, minlength=len(centers))[:, None]
    error = (torch.as_tensor(call()) - means).abs().max().item()
    assert error < PEER_TOLERANCE, f"faiss Kmeans: a mean errs by {error:.3g}"
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


def _tensors(raw: Any) -> tuple[Tensor, ...]:
    return tuple(torch.as_tensor(array) for array in raw)


_LARGE = "x100000_|bank_real"
PEERS: dict[str, list[Contender]] = {
    "cosine_max": [
        Contender("torch", _torch_max, _first),
        Contender("numpy", _numpy_max, _first, "numpy"),
        Contender("faiss-ip", _faiss("IndexFlatIP"), _first, "faiss"),
        Contender("faiss-l2", _faiss("IndexFlatL2"), lambda raw: (1 - _first(raw)[0] / 2,), "faiss"),
        *_compiled("cosine_max", "image_"),
    ],
    "cosine_map": [Contender("torch+opencv", _torch_opencv, _images, "cv2")],
    "knn_topk": [
        *(
            Contender(f"{OURS}-{strategy}", _bank(strategy), only=f"{_LARGE}|_full", tell=_bank_facts)
            for strategy in ("float32", "lowp", "pruned", "auto")
        ),
        Contender("torch", _torch_topk, lambda raw: (1 - raw[0],), only="_k3|_shot"),
        Contender(
            "faiss-ip",
            _faiss("IndexFlatIP"),
            lambda raw: (1 - torch.as_tensor(raw[0]),),
            "faiss",
            "_k3|_shot",
        ),
        Contender(
            "faiss-l2",
            _faiss("IndexFlatL2"),
            lambda raw: (torch.as_tensor(raw[0]) / 2,),
            "faiss",
            f"{_LARGE}|_shot|_full",
        ),
        Contender("anomalib", _anomalib, lambda raw: (raw.values[:, None],), only=f"{_LARGE}|_shot"),
        *_compiled("knn_topk", "brats_shot"),
    ],
    "dpm_stats": [
        Contender("torch", _torch_products, tuple, only="_diag"),
        Contender("torch", _torch_full, tuple, only="_full", stages=lambda call: call.seconds),
        Contender("scikit-learn", _sklearn, _tensors, "sklearn", "500_diag"),
        *_compiled("dpm_stats", "image_"),
    ],
    "kmeans_step": [
        Contender("scikit-learn", _sklearn_lloyd, _tensors, "sklearn"),
        Contender("faiss", _faiss_kmeans, lambda _: (), "faiss"),
    ],
    "upsample_blur": [
        Contender("torch+scipy", _torch_scipy, _images, "scipy"),
        Contender("opencv", _opencv, _images, "cv2"),
    ],
}
"""Operator -> the others."""
