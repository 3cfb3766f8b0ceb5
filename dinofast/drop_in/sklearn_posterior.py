"""The variational posterior of a Dirichlet-process mixture of Gaussians: from statistics to log-densities.

Every quantity follows from the mean-field bound with Beta sticks and Gauss-Wishart components (for "diag" and
"spherical" with the one number of degrees of freedom per component that scikit-learn keeps). The expected
log-density of a component is a Gaussian log-density plus a constant of the component, so `dpm_stats` makes
the expectation step.

References:
    Bishop, Pattern Recognition and Machine Learning, 2006, section 10.2.
    Blei and Jordan, "Variational inference for Dirichlet process mixtures", Bayesian Analysis 1, 2006.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dinofast.drop_in.sklearn_rows import as_floats
from dinofast.errors import InputError
from dinofast.models.mixture import quadratic_blocks
from dinofast.ops import dpm_stats
from dinofast.ops.rows import BLOCK, result_dtype, row_blocks

TINY = 10 * torch.finfo(torch.float64).eps
"""Added to the counts, as scikit-learn does."""


@dataclass(frozen=True)
class Prior:
    """What is believed of every component beforehand.

    Attributes:
        concentration: α of the sticks' Beta(1, α).
        mean_precision: β.
        mean: m (D,), float64.
        degrees_of_freedom: ν, above D − 1.
        covariance: the inverse scale: (D, D), (D,) for "diag", () for "spherical", float64.
    """

    concentration: float
    mean_precision: float
    mean: Tensor
    degrees_of_freedom: float
    covariance: Tensor


@dataclass(frozen=True)
class Statistics:
    """Sums over rows, float64.

    Attributes:
        count: Σ r (K,).
        first: Σ r x (K, D).
        second: Σ r x² (K, D), Σ r |x|² (K,) or Σ r x xᵀ (K, D, D).
        entropy: −Σ r ln r ().
    """

    count: Tensor
    first: Tensor
    second: Tensor
    entropy: Tensor

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.count + other.count,
            self.first + other.first,
            self.second + other.second,
            self.entropy + other.entropy,
        )


@dataclass(frozen=True)
class Posterior:
    """What is believed of every component, float64.

    Attributes:
        sticks: the two parameters of each stick's Beta distribution, (K,) each.
        mean_precision: (K,).
        degrees_of_freedom: (K,).
        means: (K, D).
        covariances: (K, D, D), (K, D) or (K,): the inverse of the expected precision.
    """

    sticks: tuple[Tensor, Tensor]
    mean_precision: Tensor
    degrees_of_freedom: Tensor
    means: Tensor
    covariances: Tensor

    @property
    def weights(self) -> Tensor:
        """The weights that the sticks' means give (K,), scaled to sum to 1."""
        a, b = self.sticks
        rest = (b / (a + b)).log().cumsum(0).roll(1)
        rest[0] = 0
        return ((a / (a + b)).log() + rest).softmax(0)

    def log_weights(self) -> Tensor:
        """Give (K,): the expected log-weight, and what an expected log-density has beyond the Gaussian's."""
        a, b = self.sticks
        rest = (b.digamma() - (a + b).digamma()).cumsum(0).roll(1)
        rest[0] = 0
        d, nu = self.means.shape[1], self.degrees_of_freedom
        spread = d * math.log(2) + (0.5 * (nu[:, None] - _steps(self.means))).digamma().sum(1)
        excess = 0.5 * (spread - d / self.mean_precision - d * nu.log())
        return a.digamma() - (a + b).digamma() + rest + excess

    def bound(self, entropy: Tensor) -> float:
        """Give the lower bound of the rows' evidence, less what no step changes, where self is optimal."""
        a, b = self.sticks
        d, nu = self.means.shape[1], self.degrees_of_freedom
        half_log_det = 0.5 * (-log_det(self.covariances, d) - d * nu.log())
        wishart = nu * (half_log_det + 0.5 * d * math.log(2))
        wishart = wishart + (0.5 * (nu[:, None] - _steps(self.means))).lgamma().sum(1)
        sticks = a.lgamma() + b.lgamma() - (a + b).lgamma()
        return float(entropy + (wishart + sticks - 0.5 * d * self.mean_precision.log()).sum())

    def expect(self, x: Tensor) -> tuple[Tensor, Statistics]:
        """Give ln Σ_k of the expected densities (N,) of rows, and their statistics.

        Raises:
            InputError: a full covariance that cannot be inverted in the rows' precision.
        """
        dtype, kind = result_dtype(x), kind_of(self.covariances)
        precision = precisions(self.covariances)
        log_weights = self.log_weights()
        narrow = precision.to(dtype).contiguous()
        if kind == "full" and bool(torch.linalg.cholesky_ex(narrow)[1].any()):
            raise InputError(
                f"a covariance cannot be inverted in {dtype}; give float64 rows, or raise reg_covar"
            )
        log_likelihood, *sums = dpm_stats(
            as_floats(x, dtype), self.means.to(dtype), narrow, log_weights.to(dtype), kind
        )
        count, first, second = (part.double() for part in sums)
        d = self.means.shape[1]
        constant = log_weights - 0.5 * (log_det(self.covariances, d) + d * math.log(2 * math.pi))
        form = _summed_form(self.means, precision, count, first, second)
        entropy = log_likelihood.double().sum() - (constant @ count - 0.5 * form.sum())
        return log_likelihood, Statistics(count, first, second, entropy)

    def log_joint(self, x: Tensor) -> Tensor:
        """Give the expected log-densities with the log-weights (N, K), float64."""
        wide = self.covariances
        if wide.dim() == 1:
            wide = wide[:, None].expand(self.means.shape)
        constant, forms = quadratic_blocks(x, self.means, wide)
        return torch.cat([constant + self.log_weights() - 0.5 * form for form in forms])


def maximize(prior: Prior, found: Statistics, reg_covar: float) -> Posterior:
    """Give the posterior that is optimal for statistics of rows.

    Raises:
        InputError: a covariance without positive variances.
    """
    count = found.count + TINY
    mean = found.first / count[:, None]
    tail = count.flip(0).cumsum(0).flip(0).roll(-1)
    tail[-1] = 0
    beta, nu = prior.mean_precision + count, prior.degrees_of_freedom + count
    means = (prior.mean_precision * prior.mean + found.first) / beta[:, None]
    gap, pull = mean - prior.mean, prior.mean_precision / beta
    d = mean.shape[1]
    if found.second.dim() == 3:
        own = found.second / count[:, None, None] - mean[:, :, None] * mean[:, None]
        own.diagonal(dim1=1, dim2=2).add_(reg_covar)
        scatter = own + pull[:, None, None] * gap[:, :, None] * gap[:, None]
    elif found.second.dim() == 2:
        own = (found.second / count[:, None] - mean.square()).clamp_min(0) + reg_covar
        scatter = own + pull[:, None] * gap.square()
    else:
        own = ((found.second / count - mean.square().sum(1)) / d).clamp_min(0) + reg_covar
        scatter = own + pull * gap.square().mean(1)
    shape = (-1, *[1] * (scatter.dim() - 1))
    covariances = (prior.covariance + count.view(shape) * scatter) / nu.view(shape)
    log_det(covariances, d)
    return Posterior((1 + count, prior.concentration + tail), beta, nu, means, covariances)


def assigned(x: Tensor, resp: Tensor, kind: str) -> Statistics:
    """Give the statistics of rows (N, D) with responsibilities (N, K), whose entropy counts as none."""
    k, d = resp.shape[1], x.shape[1]
    shapes: dict[str, tuple[int, ...]] = {"full": (k, d, d), "diag": (k, d), "spherical": (k,)}
    count, first = x.new_zeros(k, dtype=torch.float64), x.new_zeros(k, d, dtype=torch.float64)
    second, start = x.new_zeros(shapes[kind], dtype=torch.float64), 0
    for block in row_blocks(x, BLOCK // max(k, d)):
        rows, share = block.double(), resp[start : start + len(block)].double()
        start += len(block)
        count += share.sum(0)
        first += share.T @ rows
        if kind == "full":
            for component in range(k):
                second[component] += (rows * share[:, component, None]).T @ rows
        else:
            square = rows.square() if kind == "diag" else rows.square().sum(1)
            second += share.T @ square
    return Statistics(count, first, second, count.new_zeros(()))


def kind_of(covariances: Tensor) -> str:
    """Give the name that `dpm_stats` has for covariances of this shape."""
    return {1: "spherical", 2: "diag", 3: "full"}[covariances.dim()]


def precisions(covariances: Tensor) -> Tensor:
    """Invert covariances."""
    if covariances.dim() < 3:
        return covariances.reciprocal()
    return torch.cholesky_inverse(torch.linalg.cholesky(covariances))


def log_det(covariances: Tensor, d: int) -> Tensor:
    """Give ln |Σ| (K,).

    Raises:
        InputError: covariances that are not positive (definite).
    """
    if covariances.dim() < 3:
        good = bool((covariances > 0).all())
        found = d * covariances.log() if covariances.dim() == 1 else covariances.log().sum(1)
    else:
        factor, failed = torch.linalg.cholesky_ex(covariances)
        good, found = not bool(failed.any()), 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
    if not good or not bool(found.isfinite().all()):
        raise InputError("a component has no positive variance; raise reg_covar, or take fewer components")
    return found


def _summed_form(mu: Tensor, precision: Tensor, count: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Give Σ_i r_ik (x_i−μ)ᵀ Λ (x_i−μ) (K,) from the sums over rows."""
    if precision.dim() == 3:
        outer = mu[:, :, None] * mu[:, None]
        cross = mu[:, :, None] * first[:, None]
        return (precision * (second - cross - cross.mT + count[:, None, None] * outer)).sum((1, 2))
    scale = precision if precision.dim() == 2 else precision[:, None].expand(mu.shape)
    rest = (scale * (count[:, None] * mu.square() - 2 * mu * first)).sum(1)
    return rest + (precision * second if precision.dim() == 1 else (precision * second).sum(1))


def _steps(means: Tensor) -> Tensor:
    return torch.arange(means.shape[1], dtype=torch.float64, device=means.device)
