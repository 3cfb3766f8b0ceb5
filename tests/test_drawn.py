"""Every operator's native kernel on drawn arguments, held to the float64 reference; nothing is too odd."""

import math

import pytest
import torch
from drawing import BROKEN, DRAWN, DTYPES, HUGE, SCALES, generator, laid_out, numbers, rows
from hypothesis import given
from hypothesis import strategies as st

from dinofast.ops import Bank
from dinofast.ops.dpm_stats import COVARIANCE_TYPES
from dinofast.ops.knn_topk import METRICS
from dinofast.ops.knn_topk_bank import STRATEGIES
from dinofast.ops.registry import OPS
from dinofast.ops.upsample_blur import BOUNDARIES, MODES
from dinofast.testing import assert_kernel

native = pytest.importorskip("dinofast._native", reason="built without native kernels")
ISAS = native.available_isas()


def size(draw, low, high):
    return draw(st.integers(low, high))


def channels(draw):
    return draw(st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 48, 64, 65, 130])))


def cosine_max(draw):
    d, dtype, scales = channels(draw), draw(st.sampled_from(DTYPES)), SCALES + HUGE
    features = rows(draw, size(draw, 0, 40), d, dtype=dtype, scales=scales)
    broken = draw(st.sampled_from([(), BROKEN]))
    return features, rows(draw, size(draw, 1, 70), d, dtype=dtype, scales=scales, broken=broken)


def kmeans_step(draw):
    d, scales = channels(draw), SCALES[:-1]  # sums of squares that float32 holds
    centers = numbers(draw, size(draw, 1, 70), d, scales=scales, broken=draw(st.sampled_from([(), BROKEN])))
    return rows(draw, size(draw, 0, 60), d, scales=scales), laid_out(draw, centers)


def cosine_map(draw):
    d, dtype = channels(draw), draw(st.sampled_from(DTYPES))
    grid = size(draw, 1, 3), size(draw, 1, 9), size(draw, 1, 9)
    features = rows(draw, *grid, d, dtype=dtype, scales=SCALES + HUGE)
    mask = torch.rand(grid, generator=generator(draw)) > 0.3 if draw(st.booleans()) else None
    prototypes = rows(draw, size(draw, 1, 40), d, dtype=dtype, broken=draw(st.sampled_from([(), BROKEN])))
    return features, prototypes, [size(draw, 1, 40), size(draw, 1, 40)], mask


def knn_topk(draw):
    d, dtype, metric = channels(draw), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(METRICS))
    scales = SCALES + HUGE if metric == "cosine" else SCALES  # whose squares float32 holds
    broken = draw(st.sampled_from([(), BROKEN]))  # one broken row breaks every result
    bank = rows(draw, size(draw, 1, 70), d, dtype=dtype, scales=scales, broken=broken)
    k = size(draw, 1, min(len(bank), native.MAX_K))
    return rows(draw, size(draw, 0, 20), d, dtype=dtype, scales=scales), bank, k, metric


def knn_topk_bank(draw):
    d, metric = channels(draw), draw(st.sampled_from(METRICS))
    bank = Bank(numbers(draw, size(draw, 1, 70), d, broken=()), metric, draw(st.sampled_from(STRATEGIES)))
    k = size(draw, 1, min(len(bank.rows), native.MAX_K))
    return rows(draw, size(draw, 0, 20), d), bank.packed, k, metric, 0


def dpm_stats(draw):
    """Means where rows are; rows and variances of moderate size: test_dpm_stats.py holds the others."""
    kind, d, k = draw(st.sampled_from(COVARIANCE_TYPES)), channels(draw), size(draw, 1, 30)
    n, moderate, g = size(draw, 0, 60), {"scales": (0.0, 1e-40, 0.1, 1.0)}, generator(draw)
    broken = BROKEN if draw(st.booleans()) else ()
    x = rows(draw, n, d, broken=broken, **moderate)
    means = numbers(draw, k, d, broken=(), **moderate) * draw(st.sampled_from([0.0, 0.1, 1.0, 3.0]))
    if n and draw(st.booleans()):
        means[0] = x[n // 2].float().nan_to_num(0, 1, -1)
    spread = torch.randn(k, d, generator=g).exp()
    if kind == "full":
        root = torch.randn(k, d, 2 * d, generator=g)
        precisions = root @ root.mT / (2 * d) + spread.diag_embed()
    else:
        precisions = spread if kind == "diag" else spread[:, 0].contiguous()
    log_weights = torch.randn(k, generator=g).log_softmax(0)
    if draw(st.booleans()):
        log_weights[draw(st.integers(0, k - 1))] = -math.inf
    return x, means, precisions, log_weights, kind


def farthest_point(draw):
    n = size(draw, 1, 90)
    near = numbers(draw, n).abs()
    return rows(draw, n, channels(draw)), near, torch.tensor(size(draw, 0, n - 1))


def upsample_blur(draw):
    maps = rows(draw, size(draw, 1, 3), size(draw, 1, 40), size(draw, 1, 40), scales=(0.0, 1e-42, 1e18))
    sigma = draw(st.sampled_from([0.0, 0.1, 0.3, 1.0, 4.0, 25.0]))
    target = [size(draw, 1, 70), size(draw, 1, 70)]
    return maps, target, sigma, draw(st.sampled_from(MODES)), draw(st.sampled_from(BOUNDARIES))


ARGUMENTS = (
    cosine_max, cosine_map, kmeans_step, knn_topk, knn_topk_bank, dpm_stats, farthest_point, upsample_blur,
)  # fmt: skip


def test_every_operator_is_drawn():
    assert {draw.__name__ for draw in ARGUMENTS} == set(OPS)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda a: a.__name__)
@DRAWN
@given(data=st.data(), isa=st.sampled_from(ISAS))
def test_drawn(arguments, data, isa):
    op = OPS[arguments.__name__]
    kernel = next(kernel for kernel in op.kernels if kernel.backend == "cpu")
    args = arguments(data.draw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DINOFAST_ISA", isa)
        assert kernel.refuse(*args) is None
        assert_kernel(op, kernel, args)
