"""dpm_stats: one pass over features giving mixture log-likelihoods and sufficient statistics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dinofast.ops.registry import Cost, Sample, define
from dinofast.ops.rows import BLOCK, check_rows, require, result_dtype

COVARIANCE_TYPES = ("diag", "spherical", "full")


def dpm_stats(
    x: Tensor,
    means: Tensor,
    precisions: Tensor,
    log_weights: Tensor,
    covariance_type: str = "diag",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum the statistics of a Gaussian mixture over features, in one streamed pass.

    With r_ik the responsibility of component k for row i, the statistics are Σ_i r_ik, Σ_i r_ik x_i and
    the second moments. Neither the (N, K) responsibilities nor an N × K × D array is held.

    Args:
        x: (N, D), float32, bfloat16, float16 or float64.
        means: (K, D), K >= 1; this and the other parameters are float32 (float64 for float64 `x`), on the
            device of `x`.
        precisions: inverse covariances: (K, D) for "diag", (K,) for "spherical", (K, D, D) symmetric positive
            definite for "full".
        log_weights: (K,), natural logarithms of the component weights; −inf removes a component.
        covariance_type: "diag", "spherical" or "full".

    Returns:
        log_likelihood: (N,), ln Σ_k w_k N(x_i | k), in nats.
        count: (K,), Σ_i r_ik.
        first: (K, D), Σ_i r_ik x_i.
        second: Σ_i r_ik x_i² (K, D) for "diag"; Σ_i r_ik |x_i|² (K,) for "spherical"; Σ_i r_ik x_i x_iᵀ
            (K, D, D) for "full".
        All float32 (float64 for float64 arguments). A row with NaN or inf has log-likelihood NaN and makes
        every sum NaN; parameters with NaN or inf, log-weights of −inf aside, make everything NaN. So do
        precisions that are not positive (definite) where a Triton kernel serves the call: it waits for
        nothing on the device, and can be recorded in a CUDA graph. With no rows the sums are 0.

    Raises:
        RuntimeError: wrong dimensions, dtype, device or covariance type; precisions that are not positive
            (definite), where no Triton kernel serves the call.

    References:
        Schulthess and Konukoglu, "Anomaly detection by clustering DINO embeddings using a Dirichlet process
        mixture", 2025, arXiv 2509.19997, equations 3 to 9.

    >>> x = torch.tensor([[0.0], [4.0]])
    >>> _, count, first, _ = dpm_stats(x, x, torch.ones(2, 1), torch.tensor([0.5, 0.5]).log())
    >>> count.round(decimals=2).tolist(), first.round(decimals=2).tolist()
    ([1.0, 1.0], [[0.0], [4.0]])
    """
    results = torch.ops.dinofast.dpm_stats.default(x, means, precisions, log_weights, covariance_type)
    log_likelihood, count, first, second = results
    return log_likelihood, count, first, second


def pairs_evaluated(
    x: Tensor,
    means: Tensor,
    precisions: Tensor,
    log_weights: Tensor,
    covariance_type: str = "diag",
) -> float:
    """Measure the share of (row, component) pairs whose log-probability the native kernel computes in full.

    The others are ruled out by an upper bound: together they hold less than 2⁻³² of a row's responsibilities.

    Args:
        x: as `dpm_stats`, on the CPU, N >= 1.
        means: as `dpm_stats`.
        precisions: as `dpm_stats`.
        log_weights: as `dpm_stats`.
        covariance_type: as `dpm_stats`.

    Returns:
        A share in [0, 1].

    Raises:
        RuntimeError: as `dpm_stats`; N = 0; or no native kernel can serve the arguments.
    """
    from dinofast.ops import MISSING
    from dinofast.ops.providers import cpu  # imports this module

    require(x.shape[0] > 0, lambda: "pairs_evaluated: x has no rows")
    arguments = (x, means, precisions, log_weights, covariance_type)
    kernel = next((k for k in OP.kernels if k.backend == "cpu"), None)
    reason = kernel.refuse(*arguments) if kernel else MISSING.get("cpu")
    require(reason is None, lambda: f"pairs_evaluated: {reason}")
    return cpu.dpm_stats_native(*arguments)[1] / (x.shape[0] * means.shape[0])


def _reference(
    x: Tensor, means: Tensor, precisions: Tensor, log_weights: Tensor, covariance_type: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute in float64: the expanded quadratic form errs by 1.3 nats in float32 at variance 1e-6."""
    results = _fake(x, means, precisions, log_weights, covariance_type)
    mu, precision, log_w = means.double(), precisions.double(), log_weights.double()
    half_log_det, factor = factorize(mu, precision, covariance_type)
    constant = log_w + half_log_det - 0.5 * mu.shape[1] * math.log(2 * math.pi)
    constant = constant.masked_fill(~mu.isfinite().all(1) | (constant == torch.inf), torch.nan)
    sums = [torch.zeros_like(r, dtype=torch.float64) for r in results[1:]]
    step = max(1, BLOCK // max(mu.shape))
    for start in range(0, x.shape[0], step):
        y = x[start : start + step].double()
        log_joint = constant - 0.5 * quadratic(y, mu, precision, factor, covariance_type)
        log_likelihood = log_joint.logsumexp(dim=1)
        log_likelihood = log_likelihood.masked_fill(~y.isfinite().all(1), torch.nan)
        # where every component is impossible the row belongs to none, and its log-likelihood is −inf
        impossible = log_likelihood == -torch.inf
        r = (log_joint - log_likelihood[:, None]).exp().masked_fill(impossible[:, None], 0)
        results[0][start : start + step] = log_likelihood
        sums[0] += r.sum(0)
        sums[1] += r.T @ y
        if covariance_type == "diag":
            sums[2] += r.T @ y.square()
        elif covariance_type == "spherical":
            sums[2] += r.T @ y.square().sum(1)
        else:
            for k in range(mu.shape[0]):
                sums[2][k] += (y * r[:, k, None]).T @ y
    count, first, second = (s.to(results[0].dtype) for s in sums)
    return results[0], count, first, second


def factorize(mu: Tensor, precision: Tensor, covariance_type: str) -> tuple[Tensor, Tensor | None]:
    """Give ½ ln|Λ| (K,) of every component and, for full covariance, the Cholesky factors of Λ (K, D, D).

    Raises:
        RuntimeError: precisions that are not positive (definite).
    """
    if covariance_type == "full":
        factor, failed = torch.linalg.cholesky_ex(precision)
        require_definite(int(failed.nonzero()[0]) if failed.any() else -1)
        return factor.diagonal(dim1=1, dim2=2).log().sum(1), factor
    require(bool((precision > 0).all()), lambda: "dpm_stats: precisions must be positive")
    if covariance_type == "diag":
        return 0.5 * precision.log().sum(1), None
    return 0.5 * mu.shape[1] * precision.log(), None


def log_constants(means: Tensor, precisions: Tensor, log_weights: Tensor, covariance_type: str) -> Tensor:
    """Give ln w − ½ D ln 2π of every component in float64, with + ½ ln |Λ| unless covariance is full."""
    constants = log_weights.double() - 0.5 * means.shape[1] * math.log(2 * math.pi)
    if covariance_type == "full":
        return constants
    return constants + factorize(means, precisions.double(), covariance_type)[0]


def negligible_nats(components: int) -> float:
    """Give how far below a row's best component any other is left out, in nats.

    All that is left out together holds less than 2⁻³² of a row's responsibilities.
    """
    return 32 * math.log(2) + math.log(components)


def require_definite(failed: int) -> None:
    """Raise RuntimeError if `failed`, the number of a component, is not −1."""
    require(failed < 0, lambda: f"dpm_stats: precisions of component {failed} are not positive definite")


def quadratic(
    y: Tensor, mu: Tensor, precision: Tensor, factor: Tensor | None, covariance_type: str
) -> Tensor:
    """Give (y−μ)ᵀ Λ (y−μ) for every pair, (n, K), at least 0; `factor` as `factorize` gives it."""
    if factor is not None:
        return torch.stack([((y - m) @ f).square().sum(1) for m, f in zip(mu, factor, strict=True)], 1)
    scale = precision if covariance_type == "diag" else precision[:, None].expand(mu.shape)
    form = y.square() @ scale.T - 2 * (y @ (mu * scale).T) + (mu.square() * scale).sum(1)
    return form.clamp_min(0)


def _fake(
    x: Tensor, means: Tensor, precisions: Tensor, log_weights: Tensor, covariance_type: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = result_dtype(x)
    check_rows("dpm_stats", may_be_empty=True, x=x)
    check_rows("dpm_stats", means=means)
    k, d = means.shape
    require(
        covariance_type in COVARIANCE_TYPES,
        lambda: (
            f"dpm_stats: unknown covariance type {covariance_type!r}; one of {', '.join(COVARIANCE_TYPES)}"
        ),
    )
    shapes: dict[str, tuple[int, ...]] = {"diag": (k, d), "spherical": (k,), "full": (k, d, d)}
    shape = shapes[covariance_type]
    _check_table(x, "means", means, (k, x.shape[1]))
    _check_table(x, "precisions", precisions, shape)
    _check_table(x, "log_weights", log_weights, (k,))
    results = ((x.shape[0],), (k,), (k, d), shape)
    log_likelihood, count, first, second = (x.new_empty(s, dtype=dtype) for s in results)
    return log_likelihood, count, first, second


def _check_table(x: Tensor, name: str, table: Tensor, shape: tuple[int, ...]) -> None:
    require(table.shape == shape, lambda: f"dpm_stats: {name} must be {shape}, got {tuple(table.shape)}")
    require(
        table.dtype == result_dtype(x) and table.device == x.device,
        lambda: (
            f"dpm_stats: {name} must be {result_dtype(x)} on {x.device}, got {table.dtype} on {table.device}"
        ),
    )


def _samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)

    def case(name: str, n: int, k: int, d: int, kind: str, variance: float = 1.0) -> Sample:
        means = torch.randn(k, d, generator=generator)
        owner = torch.randint(k, (n,), generator=generator)
        x = means[owner] + variance**0.5 * torch.randn(n, d, generator=generator)
        if kind == "full":
            root = torch.randn(k, d, 2 * d, generator=generator)
            precisions = root @ root.mT / (2 * d * variance)
        else:
            spread = 0.5 + torch.rand(k, d, generator=generator)
            precisions = (spread if kind == "diag" else spread[:, 0]) / variance
        weights = torch.rand(k, generator=generator).log_softmax(0)
        return Sample(f"{kind} {name}", (x, means, precisions, weights, kind))

    found = []
    for kind in COVARIANCE_TYPES:
        found += [case(f"{n}x{k}x{d}", n, k, d, kind) for n, k, d in [(0, 2, 3), (1, 1, 1), (130, 7, 33)]]
        found.append(case("variance 1e-6", 65, 5, 16, kind, variance=1e-6))
        weightless = case("dead component", 40, 5, 8, kind)
        weightless.args[3][2] = -torch.inf
        found.append(weightless)
        broken = case("NaN row", 40, 5, 8, kind)
        broken.args[0][3, 1] = torch.nan
        found.append(broken)
    found.append(case("strided", 66, 9, 20, "diag"))
    x, *rest = found[-1].args
    found[-1] = Sample("diag strided", (torch.cat([x, x], 1)[:, 20:], *rest))
    up = 1 + 3 * 2**-8  # bfloat16 rounds it up by nearly 2**-8
    x, means = torch.full((1, 64), 64 * up**0.5), torch.zeros(2, 64)
    twins = torch.tensor([2.0**-20, up])[:, None].expand(2, 64).contiguous()
    form = 0.5 * (x.double() ** 2 * twins - twins.double().log()).sum(1)
    weights = torch.tensor([form[0] - form[1] - 10, 0.0], dtype=torch.float32)
    found.append(Sample("diag rounded up", (x, means, twins, weights, "diag")))
    found.append(Sample("full rounded up", (x, means, twins.diag_embed(), weights, "full")))
    return found


def _tolerance(args: tuple[object, ...], result: int) -> tuple[float, float]:
    """Allow √N units in the last place to sums over N rows, √D to the log-likelihood."""
    x = args[0]
    assert isinstance(x, Tensor)
    terms = x.shape[1] if result == 0 else max(1, x.shape[0])
    return 1e-5, 4 * terms**0.5 * torch.finfo(torch.float32).eps


def _cost(x: Tensor, means: Tensor, precisions: Tensor, log_weights: Tensor, covariance_type: str) -> Cost:
    (n, d), k = x.shape, means.shape[0]
    pairs = n * k * (4 * d * d if covariance_type == "full" else 8 * d)
    tables = (means.numel() + 2 * precisions.numel() + means.numel()) * x.element_size()
    return Cost(bytes=x.numel() * x.element_size() + tables + 4 * n, flops=pairs)


OP = define(
    "dpm_stats(Tensor x, Tensor means, Tensor precisions, Tensor log_weights, str covariance_type)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    samples=_samples,
    cost=_cost,
    inputs=(0,),
    tolerance=_tolerance,
)
