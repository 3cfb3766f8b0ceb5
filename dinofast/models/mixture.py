"""A Dirichlet-process mixture of Gaussians, truncated and learned batch by batch: tensors in, tensors out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dinofast.errors import ArtifactError, InputError
from dinofast.models.params import check_number
from dinofast.ops import dpm_stats
from dinofast.ops.dpm_stats import factorize, quadratic
from dinofast.ops.rows import BLOCK, result_dtype, row_blocks

SCHEDULES = ("ema", "exp")
FLOAT32_FLOOR = -150 * math.log(2)
"""The logarithm below which exp gives 0 in float32: half the smallest subnormal number."""


@dataclass(frozen=True)
class Mixture:
    """Where a mixture of K components stands.

    Attributes:
        mass: p (K,), float64: running mean of the responsibilities; at most 1 in sum.
        first: m (K, D): running mean of the rows, weighted by responsibility.
        second: C: running second moment, (K, D) or, for full covariance, (K, D, D).
        sticks: v (K,), float64, in [0, 1]; see `Rule.bounded` for the last.
        concentration: α (), float64, at least 1 or, where the rule leaves it unbounded, 0.
        iteration: t, steps made.
        means: μ (K, D).
        covariances: Σ, of the shape of `second`; without regard to `mass` all positive (definite).
    """

    mass: Tensor
    first: Tensor
    second: Tensor
    sticks: Tensor
    concentration: Tensor
    iteration: int
    means: Tensor
    covariances: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Give all attributes as tensors, by name; none is copied."""
        return vars(self) | {"iteration": torch.tensor(self.iteration, device=self.means.device)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Mixture:
        """Take what `tensors` gave, among others; nothing is copied."""
        named: dict[str, Any] = {field.name: tensors[field.name] for field in fields(cls)}
        return cls(**named | {"iteration": int(named["iteration"])})


def check_tensors(tensors: Mapping[str, Tensor], n_components: int, *, full: bool) -> None:
    """Raise ArtifactError unless `Mixture.of` can take these tensors: float32 rows, float64 the rest."""
    means = tensors.get("means")
    names = {field.name for field in fields(Mixture)}
    if not names <= set(tensors) or means is None or means.dim() != 2 or means.shape[1] < 1:
        raise ArtifactError(f"a mixture holds {', '.join(sorted(names))}; this holds {sorted(tensors)}")
    k, d = n_components, means.shape[1]
    wide = (k, d, d) if full else (k, d)
    rows = {"first": (k, d), "means": (k, d), "second": wide, "covariances": wide}
    scalars: dict[str, tuple[int, ...]] = {"mass": (k,), "sticks": (k,), "concentration": (), "iteration": ()}
    for name, shape in (rows | scalars).items():
        dtype = torch.float32 if name in rows else torch.int64 if name == "iteration" else torch.float64
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ArtifactError(
                f"{name} of a mixture of {k} components must be {dtype} {shape}, "
                f"this is {tensor.dtype} {tuple(tensor.shape)}"
            )


@dataclass(frozen=True)
class Rule:
    """How a step changes a mixture.

    Attributes:
        spherical: whether a component has the mean of its variances in every channel.
        schedule: "ema": every step has the size `update_rate`, the first too. "exp": step t has the size
            t^(−`update_rate`). None: size 1, nothing is remembered.
        update_rate: see `schedule`; None is size 1 too.
        learn_concentration: whether α is learned.
        eps: added to denominators, above 0.
        reg_covar: added to variances, at least 0.
        closed: whether the last stick is 1 after every step, so that the weights sum to 1.
        floor: log-weights below this are −inf.
        bounded: whether a learned α is kept at 1 or above. Below 1 the last stick may exceed 1; any
            other that would is 1.

    Raises:
        InputError: a value out of range.
    """

    spherical: bool = False
    schedule: str | None = "ema"
    update_rate: float | None = 0.2
    learn_concentration: bool = True
    eps: float = torch.finfo(torch.float32).eps
    reg_covar: float = 1e-6
    closed: bool = True
    floor: float = -math.inf
    bounded: bool = True

    def __post_init__(self) -> None:
        if self.schedule not in (*SCHEDULES, None):
            raise InputError(f"unknown schedule {self.schedule!r}; one of {', '.join(SCHEDULES)}, or None")
        if self.update_rate is not None:
            check_number("in (0, 1]", lambda v: 0 < v <= 1, update_rate=self.update_rate)
        check_number("above 0", lambda v: v > 0, eps=self.eps)
        check_number("at least 0", lambda v: v >= 0, reg_covar=self.reg_covar)

    def step_size(self, iteration: int) -> float:
        """Give γ of step `iteration`, counted from 1."""
        if self.schedule is None or self.update_rate is None:
            return 1.0
        return self.update_rate if self.schedule == "ema" else float(iteration**-self.update_rate)

    def log_weights(self, sticks: Tensor) -> Tensor:
        """Give ln π (K,) of sticks v (K,): ln v_k + Σ_{j<k} ln(1 − v_j), or −inf below `floor`."""
        rest = torch.log1p(-sticks).cumsum(0).roll(1)
        rest[0] = 0
        found = sticks.log() + rest
        return found.masked_fill(found < self.floor, -torch.inf)


def begin(means: Tensor, variance: Tensor, sticks: Tensor, concentration: float, *, full: bool) -> Mixture:
    """Make a mixture that has seen nothing.

    Args:
        means: (K, D).
        variance: (D,), of every component, above 0.
        sticks: (K,), float64, in [0, 1].
        concentration: α, at least 1.
        full: whether components have full covariances.

    Raises:
        InputError: values out of range of the means' dtype.
    """
    spread = (variance.diag() if full else variance).to(means.dtype)
    covariances = spread.repeat(len(means), *[1] * spread.dim())
    mixture = Mixture(
        mass=torch.zeros_like(sticks),
        first=torch.zeros_like(means),
        second=torch.zeros_like(covariances),
        sticks=sticks,
        concentration=torch.tensor(concentration, dtype=torch.float64, device=means.device),
        iteration=0,
        means=means,
        covariances=covariances,
    )
    _check_range(mixture)
    return mixture


def step(mixture: Mixture, x: Tensor, rule: Rule) -> tuple[Mixture, Tensor]:
    """Make one step of expectation and maximization on the rows x (N, D), N >= 1.

    Returns:
        The mixture after it, and ln p(x_i) (N,) under the one before it.

    Raises:
        InputError: rows with NaN or inf, or statistics out of range; a full covariance that cannot be
            inverted.
    """
    log_weights = rule.log_weights(mixture.sticks)
    log_likelihood, count, first, second = statistics(x, mixture.means, mixture.covariances, log_weights)
    after = update(mixture, count, first, second, x.shape[0], rule)
    _check_range(after)
    return after, log_likelihood


def statistics(
    x: Tensor, means: Tensor, covariances: Tensor, log_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call `dpm_stats` with covariances (K, D) or (K, D, D), in the precision of the rows.

    Raises:
        InputError: a full covariance that cannot be inverted.
    """
    dtype = result_dtype(x)
    kind = "full" if covariances.dim() == 3 else "diag"
    precisions = _precisions(covariances).to(dtype)
    return dpm_stats(x, means.to(dtype), precisions, log_weights.to(dtype), kind)


def update(mixture: Mixture, count: Tensor, first: Tensor, second: Tensor, n: int, rule: Rule) -> Mixture:
    """Make the maximization step from the statistics of n rows.

    Args:
        mixture: before the step.
        count: Σ r (K,).
        first: Σ r x (K, D).
        second: Σ r x² (K, D) or, for full covariance, Σ r x xᵀ (K, D, D).
        n: rows they were summed over, at least 1.
        rule: how.
    """
    size = rule.step_size(mixture.iteration + 1)

    def average(old: Tensor, new: Tensor) -> Tensor:
        return new.to(old.dtype).mul(size / n).add_(old, alpha=1 - size)

    mass = average(mixture.mass, count)
    first, second = average(mixture.first, first), average(mixture.second, second)
    means, covariances = _components(mass, first, second, rule)
    tail = mass.flip(0).cumsum(0).flip(0).roll(-1)
    tail[-1] = 0
    total = mass + (mixture.concentration - 1) / n + tail + rule.eps
    sticks = torch.where(total > 0, mass / total, (mass > 0).to(mass.dtype))
    sticks[:-1].clamp_(max=1)
    if rule.closed:
        sticks[-1] = 1
    concentration = mixture.concentration
    if rule.learn_concentration and len(mass) > 1:
        ends = torch.digamma(n * (mass + tail) + concentration + 1) - torch.digamma(n * tail + concentration)
        concentration = ((len(mass) - 1) / ends[:-1].sum()).clamp_min(1 if rule.bounded else 0)
    return Mixture(
        mass, first, second, sticks, concentration, mixture.iteration + 1, means, covariances.contiguous()
    )


def quadratic_blocks(x: Tensor, means: Tensor, covariances: Tensor) -> tuple[Tensor, Iterator[Tensor]]:
    """Give what a log-density is made of, in float64, block by block of the rows.

    Args:
        x: (N, D).
        means: (K, D).
        covariances: (K, D) or (K, D, D).

    Returns:
        constant: (K,), −½ (D ln 2π + ln |Σ|).
        forms: blocks (n, K) of (x−μ)ᵀ Σ⁻¹ (x−μ), at least 0, in the order of the rows; one empty block
            without rows.
    """
    parts = Quadratic.of(means, covariances)
    return parts.constant, parts.blocks(x)


@dataclass(frozen=True)
class Quadratic:
    """What quadratic forms are computed from, prepared once for many rows, in float64.

    Attributes:
        means: (K, D).
        precision: (K, D); for full covariance (K, 0), the factor says it all.
        factor: Cholesky factors of the precisions (K, D, D), None for diagonal covariance.
        constant: (K,), −½ (D ln 2π + ln |Σ|).
    """

    means: Tensor
    precision: Tensor
    factor: Tensor | None
    constant: Tensor

    @classmethod
    def of(cls, means: Tensor, covariances: Tensor) -> Quadratic:
        """Factorize; see `quadratic_blocks` for the arguments."""
        full = covariances.dim() == 3
        mu, precision = means.double(), _precisions(covariances.double())
        half_log_det, factor = factorize(mu, precision, "full" if full else "diag")
        constant = half_log_det - 0.5 * mu.shape[1] * math.log(2 * math.pi)
        return cls(mu, mu.new_empty(len(mu), 0) if full else precision, factor, constant)

    def to(self, device: str | torch.device) -> Quadratic:
        """Copy to a device."""
        factor = None if self.factor is None else self.factor.to(device)
        moved = (x.to(device) for x in (self.means, self.precision, self.constant))
        means, precision, constant = moved
        return Quadratic(means, precision, factor, constant)

    def blocks(self, x: Tensor) -> Iterator[Tensor]:
        """Give the forms of rows (N, D), see `quadratic_blocks`; nothing waits for a value."""
        kind = "diag" if self.factor is None else "full"
        parts = row_blocks(x, BLOCK // (len(self.means) * (1 if self.factor is None else x.shape[1])))
        return (quadratic(part.double(), self.means, self.precision, self.factor, kind) for part in parts)


def _check_range(mixture: Mixture) -> None:
    parts = (mixture.mass, mixture.means, mixture.covariances)
    if not all(bool(found.isfinite().all()) for found in parts):
        raise InputError(
            f"step {mixture.iteration} of the mixture leaves the range of {mixture.means.dtype}; look for "
            "NaN and for tokens of extreme size, normalize them, or raise reg_covar."
        )


def _components(mass: Tensor, first: Tensor, second: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Give μ and Σ of statistics; a component without mass gets μ = 0 and Σ = `reg_covar`."""
    divisor = (mass + rule.eps)[:, None]
    means = first.double() / divisor
    if second.dim() == 2:
        variance = (second.double() / divisor - means.square()).clamp_min_(0).add_(rule.reg_covar)
        if rule.spherical:
            variance = variance.mean(1, keepdim=True).expand_as(means)
        return means.to(first.dtype), variance.to(second.dtype)
    covariances = torch.empty_like(second)
    for block in _component_blocks(second):
        mu = means[block]
        wide = second[block].double() / divisor[block, :, None] - mu[:, :, None] * mu[:, None]
        covariances[block] = _definite(wide, rule.reg_covar)
    return means.to(first.dtype), covariances


def _definite(wide: Tensor, reg_covar: float) -> Tensor:
    """Add `reg_covar` to the diagonals; what rounding made indefinite gets no eigenvalue below it."""
    wide.diagonal(dim1=1, dim2=2).add_(reg_covar)
    failed = torch.linalg.cholesky_ex(wide)[1] != 0
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(wide[failed])
        wide[failed] = vectors * values.clamp_min(reg_covar)[:, None] @ vectors.mT
    return wide


def _precisions(covariances: Tensor) -> Tensor:
    if covariances.dim() == 2:
        return covariances.reciprocal()
    precisions = torch.empty_like(covariances)
    for block in _component_blocks(covariances):
        factor, failed = torch.linalg.cholesky_ex(covariances[block].double())
        _require_definite(failed, block, covariances.dtype)
        precisions[block] = torch.cholesky_inverse(factor)
        _require_definite(torch.linalg.cholesky_ex(precisions[block])[1], block, covariances.dtype)
    return precisions


def _require_definite(failed: Tensor, block: slice, dtype: torch.dtype) -> None:
    if bool(failed.any()):
        k = block.start + int(failed.nonzero()[0])
        raise InputError(
            f"the covariance of component {k} cannot be inverted in {dtype}: its directions differ too much "
            "in size; raise reg_covar, or normalize the tokens."
        )


def _component_blocks(matrices: Tensor) -> Iterator[slice]:
    """Cut (K, D, D) into slices of at most BLOCK numbers."""
    size = max(1, BLOCK // matrices[0].numel())
    for start in range(0, len(matrices), size):
        yield slice(start, start + size)
