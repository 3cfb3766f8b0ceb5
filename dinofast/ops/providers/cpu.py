"""Kernels in C++: the only importer of _native."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from dinofast.errors import InputError
from dinofast.ops.cosine_map import _fake as cosine_map_results
from dinofast.ops.cosine_max import _fake as cosine_max_results
from dinofast.ops.dpm_stats import _fake as dpm_stats_results
from dinofast.ops.dpm_stats import log_constants, require_definite
from dinofast.ops.farthest_point import _fake as farthest_point_results
from dinofast.ops.kmeans_step import _fake as kmeans_step_results
from dinofast.ops.knn_topk import METRICS
from dinofast.ops.knn_topk import _fake as knn_topk_results
from dinofast.ops.knn_topk_bank import CODED, GROUPED, check_numbers, columns_of, forms_of
from dinofast.ops.knn_topk_bank import _fake as knn_topk_bank_results
from dinofast.ops.providers.shared import DTYPES, absent, dense, matrix, refuse_dtype, refuse_rows
from dinofast.ops.registry import MISSING, Kernel, forced_backend, provide
from dinofast.ops.rows import normalize_rows, require
from dinofast.ops.upsample_blur import Weights, resample_weights
from dinofast.ops.upsample_blur import _fake as upsample_blur_results

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _naming_isa(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Raise InputError where native code finds that `DINOFAST_ISA` names nothing it can use."""

    @wraps(call)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return call(*args, **kwargs)
        except ValueError as error:
            if not str(error).startswith("DINOFAST_ISA="):
                raise
            raise InputError(str(error)) from error

    return checked


@_naming_isa
def instruction_set() -> str:
    """Name what the native CPU kernels use: the best there is here, or `DINOFAST_ISA`; "none" without them.

    Raises:
        InputError: `DINOFAST_ISA` names nothing that this processor has.
    """
    return "none" if "cpu" in MISSING else _native.isa()


def _refuse_cosine_map(
    features: Tensor, prototypes: Tensor, size: list[int], mask: Tensor | None
) -> str | None:
    if max(features[..., 0].numel(), prototypes.shape[0]) >= 1 << 31:
        return f"wants fewer than 2**31 patches and prototypes, got {features[..., 0].numel()}"
    return refuse_dtype(features)


def _refuse_dpm_stats(x: Tensor, means: Tensor, *others: Tensor | str) -> str | None:
    if means.shape[0] >= 1 << 31:
        return f"wants fewer than 2**31 components, got {means.shape[0]}"
    return refuse_dtype(x)


try:
    from dinofast import _native
except ImportError as error:
    MISSING["cpu"] = absent(error, "C++ compiler")
else:
    _NATIVE_ELEMENTS = dict(zip(DTYPES, (_native.FLOAT32, _native.BFLOAT16, _native.FLOAT16), strict=True))
    _threads = torch.get_num_threads

    def _pin_threads() -> None:
        """Compute in one thread from now on: OpenMP's other threads did not survive the fork."""
        global _threads
        _threads = lambda: 1  # noqa: E731

    if hasattr(os, "register_at_fork"):  # where processes fork
        os.register_at_fork(after_in_child=_pin_threads)

    @_naming_isa
    def _cosine_max_cpu(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        similarity, index = cosine_max_results(features, prototypes)
        features, prototypes = dense(features), dense(prototypes)
        _native.cosine_max(
            *matrix(features),
            *matrix(prototypes),
            features.shape[1],
            _NATIVE_ELEMENTS[features.dtype],
            similarity.data_ptr(),
            index.data_ptr(),
            _threads(),
        )
        return similarity, index

    provide("cosine_max", Kernel("cpu", ("cpu",), _cosine_max_cpu, refuse_rows))

    def _refuse_knn_topk(queries: Tensor, bank: Tensor, k: int, metric: str) -> str | None:
        return f"wants k <= {_native.MAX_K}, got {k}" if k > _native.MAX_K else refuse_dtype(queries)

    @_naming_isa
    def _knn_topk_cpu(queries: Tensor, bank: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
        distance, index = knn_topk_results(queries, bank, k, metric)
        queries, bank = dense(queries), dense(bank)
        _native.knn_topk(
            *matrix(queries),
            *matrix(bank),
            queries.shape[1],
            _NATIVE_ELEMENTS[queries.dtype],
            False,
            k,
            METRICS.index(metric),
            distance.data_ptr(),
            index.data_ptr(),
            _threads(),
        )
        return distance, index

    provide("knn_topk", Kernel("cpu", ("cpu",), _knn_topk_cpu, _refuse_knn_topk))

    def _refuse_knn_topk_bank(
        queries: Tensor, packed: list[Tensor], k: int, metric: str, probes: int
    ) -> str | None:
        if packed[0].dtype != torch.float32:
            return f"wants a float32 bank, got {packed[0].dtype}"
        return _refuse_knn_topk(queries, packed[0], k, metric)

    @_naming_isa
    def _knn_topk_bank_cpu(
        queries: Tensor, packed: list[Tensor], k: int, metric: str, probes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        distance, index, visited = knn_topk_bank_results(queries, packed, k, metric, probes)
        m, d = packed[0].shape
        if len(packed) == 1:
            queries = dense(queries).float()
            _native.knn_topk(
                *matrix(queries),
                *matrix(packed[0]),
                d,
                _native.FLOAT32,
                True,
                k,
                METRICS.index(metric),
                distance.data_ptr(),
                index.data_ptr(),
                _threads(),
            )
            return distance, index, visited.copy_(torch.tensor([0, 0, m]))
        check_numbers(packed)
        pointers, columns, groups, depth = _packed(packed)
        queries = dense(queries)
        _native.knn_topk_bank(
            *matrix(queries),
            d,
            _NATIVE_ELEMENTS[queries.dtype],
            pointers,
            m,
            columns,
            groups,
            depth,
            k,
            METRICS.index(metric),
            probes,
            distance.data_ptr(),
            index.data_ptr(),
            visited.data_ptr(),
            _threads(),
        )
        return distance, index, visited

    provide("knn_topk_bank", Kernel("cpu", ("cpu",), _knn_topk_bank_cpu, _refuse_knn_topk_bank))

    @lru_cache(maxsize=64)
    def _axes(
        h: int, w: int, height: int, width: int, sigma: float, mode: str, boundary: str
    ) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int], tuple[Weights, Weights]]:
        """Give the rows' weights by pixel and the columns' by patch as pointers, and what they point into."""
        rows, _ = resample_weights(h, height, sigma, mode, boundary)
        _, columns = resample_weights(w, width, sigma, mode, boundary)
        left, right = (
            (x.count, x.start.data_ptr(), x.index.data_ptr(), x.weight.data_ptr()) for x in (rows, columns)
        )
        return left, right, (rows, columns)

    @_naming_isa
    def _upsample_blur_cpu(map: Tensor, size: list[int], sigma: float, mode: str, boundary: str) -> Tensor:
        pixels = upsample_blur_results(map, size, sigma, mode, boundary)
        map = map.to(torch.float32).contiguous()
        (b, h, w), (height, width) = map.shape, size
        rows, columns, _alive = _axes(h, w, height, width, sigma, mode, boundary)
        _native.upsample_blur(map.data_ptr(), b, h, rows, columns, width, pixels.data_ptr(), _threads())
        return pixels

    @_naming_isa
    def _cosine_map_cpu(features: Tensor, prototypes: Tensor, size: list[int], mask: Tensor | None) -> Tensor:
        pixels = cosine_map_results(features, prototypes, size, mask)
        (_, h, w, d), (height, width) = features.shape, size
        features, prototypes = dense(features.reshape(-1, d)), dense(prototypes)
        mask = None if mask is None else mask.contiguous()
        rows, columns, _alive = _axes(h, w, height, width, 0.0, "bilinear", "reflect")
        _native.cosine_map(
            *matrix(features),
            *matrix(prototypes),
            d,
            _NATIVE_ELEMENTS[features.dtype],
            0 if mask is None else mask.data_ptr(),
            h,
            rows,
            columns,
            width,
            pixels.data_ptr(),
            _threads(),
        )
        return pixels

    @_naming_isa
    def _farthest_point_cpu(rows: Tensor, min_distance: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        nearest, farthest = farthest_point_results(rows, min_distance, index)
        n, center = rows.shape[0], int(index)
        require(0 <= center < n, lambda: f"farthest_point: index {center} is outside [0, {n})")
        rows, min_distance = dense(rows), min_distance.contiguous()
        farthest.fill_(
            _native.farthest_point(
                *matrix(rows),
                rows.shape[1],
                _NATIVE_ELEMENTS[rows.dtype],
                min_distance.data_ptr(),
                center,
                nearest.data_ptr(),
                _threads(),
            )
        )
        return nearest, farthest

    provide("upsample_blur", Kernel("cpu", ("cpu",), _upsample_blur_cpu, refuse_dtype))
    provide("cosine_map", Kernel("cpu", ("cpu",), _cosine_map_cpu, _refuse_cosine_map))
    provide("farthest_point", Kernel("cpu", ("cpu",), _farthest_point_cpu, refuse_dtype))

    @_naming_isa
    def _kmeans_step_cpu(rows: Tensor, centers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        index, sq_distance, sums, counts = kmeans_step_results(rows, centers)
        rows, centers = dense(rows), dense(centers)
        _native.kmeans_step(
            *matrix(rows),
            rows.shape[1],
            _NATIVE_ELEMENTS[rows.dtype],
            *matrix(centers),
            index.data_ptr(),
            sq_distance.data_ptr(),
            sums.data_ptr(),
            counts.data_ptr(),
            _threads(),
        )
        return index, sq_distance, sums, counts

    provide("kmeans_step", Kernel("cpu", ("cpu",), _kmeans_step_cpu, refuse_rows))

    @_naming_isa
    def dpm_stats_native(
        x: Tensor, means: Tensor, precisions: Tensor, log_weights: Tensor, covariance_type: str
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], int, float]:
        """Give the results, how many log-probabilities were computed, and the seconds until the sums."""
        log_likelihood, count, first, second = dpm_stats_results(
            x, means, precisions, log_weights, covariance_type
        )
        constants = log_constants(means, precisions, log_weights, covariance_type)
        x, means = dense(x), means.contiguous()
        wide = second
        if covariance_type == "spherical":
            precisions, wide = precisions[:, None].expand(means.shape), torch.empty_like(first)
        # matrices that torch.linalg gives are column-major, and symmetric here: no copy
        columns = covariance_type == "full" and precisions.mT.is_contiguous()
        precisions = precisions.mT if columns else precisions.contiguous()
        failed, evaluated, seconds = _native.dpm_stats(
            *matrix(x),
            x.shape[1],
            _NATIVE_ELEMENTS[x.dtype],
            means.data_ptr(),
            precisions.data_ptr(),
            constants.data_ptr(),
            means.shape[0],
            covariance_type == "full",
            log_likelihood.data_ptr(),
            count.data_ptr(),
            first.data_ptr(),
            wide.data_ptr(),
            _threads(),
        )
        require_definite(failed)
        if covariance_type == "spherical":
            torch.sum(wide, 1, out=second)
        return (log_likelihood, count, first, second), evaluated, seconds

    def _dpm_stats_cpu(
        x: Tensor, means: Tensor, precisions: Tensor, log_weights: Tensor, covariance_type: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return dpm_stats_native(x, means, precisions, log_weights, covariance_type)[0]

    provide("dpm_stats", Kernel("cpu", ("cpu",), _dpm_stats_cpu, _refuse_dpm_stats))


@_naming_isa
def has_int8() -> bool:
    """Tell whether the instruction set in use multiplies int8 faster than float32."""
    return "cpu" not in MISSING and _native.int8_isa() != "baseline"


def int8_columns() -> int:
    """Give the columns of a panel of int8 codes."""
    return _native.INT8_COLUMNS


def no_codes(d: int) -> str:
    """Tell why rows of D channels cannot be searched by int8 codes, or nothing."""
    if "cpu" in MISSING:
        return f"no native kernels: {MISSING['cpu']}"
    return f"D = {d} exceeds {_native.INT8_MAX_D}" if d > _native.INT8_MAX_D else ""


@_naming_isa
def unit_rows(rows: Tensor) -> Tensor:
    """Scale float32 rows (M, D) on the CPU to unit norm with the bits that `knn_topk` computes on the way."""
    if "cpu" in MISSING:
        return normalize_rows(rows)
    out, rows = torch.empty(rows.shape), dense(rows)
    _native.unit_rows(*matrix(rows), rows.shape[1], _native.FLOAT32, out.data_ptr(), _threads())
    return out


def _packed(packed: list[Tensor]) -> tuple[list[int], int, int, int]:
    """Give the pointers of a packed bank, 0 where there is no form, and P, G and H."""
    forms = forms_of(packed)
    pointers = [forms[name].data_ptr() if name in forms else 0 for name in CODED + GROUPED[2:]]
    grouped = (len(forms["radius"]), forms["basis"].shape[1]) if "basis" in forms else (0, 0)
    return pointers, columns_of(forms), *grouped


@_naming_isa
def quantize_bank(packed: list[Tensor], metric: str) -> None:
    """Fill what `knn_topk_bank.BOTH` tells of codes, errors and outlines from the rest."""
    pointers, columns, groups, depth = _packed(packed)
    (m, d), number = packed[0].shape, METRICS.index(metric)
    _native.quantize_bank(pointers, m, columns, groups, depth, d, number, _threads())


@_naming_isa
def native_k_center(
    rows: Tensor, starts: list[int], mean: bool, limit: int
) -> Callable[[Tensor], None] | None:
    """Offer greedy k-center selection in native code, which computes few of the distances.

    Args:
        rows: (N, D), float32, finite; must not change while rows are selected.
        starts: a row that is selected already, or with `mean` rows whose mean distance begins the selection.
        mean: see `starts`.
        limit: rows to select in all.

    Returns:
        A function that fills a contiguous int64 vector with the next rows selected; None where there are no
        native kernels for these rows or another backend is forced.
    """
    if "cpu" in MISSING or not rows.is_cpu or forced_backend() not in (None, "cpu"):
        return None
    rows = dense(rows)
    selection = _native.KCenter(*matrix(rows), rows.shape[1], starts, mean, limit, _threads())

    def select(index: Tensor, _alive: Tensor = rows) -> None:
        selection.select(index.shape[0], index.data_ptr(), _threads())

    return select
