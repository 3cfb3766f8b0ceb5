"""scikit-learn's variational Dirichlet-process mixture on `dpm_stats`, with a `partial_fit`."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.cluster import kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from dinofast.drop_in.sklearn_kmeans import KMeans
from dinofast.drop_in.sklearn_posterior import Posterior, Prior, Statistics, assigned, maximize
from dinofast.drop_in.sklearn_rows import check_choice, check_number, check_whole, rows_of
from dinofast.errors import InputError
from dinofast.interop import like, on_callers_stream
from dinofast.ops.rows import BLOCK, result_dtype, row_blocks

if TYPE_CHECKING:
    from typing_extensions import Self

KINDS = ("full", "diag", "spherical")
STARTS = ("kmeans", "k-means++", "random", "random_from_data")


@on_callers_stream
class BayesianGaussianMixture(DensityMixin, BaseEstimator):  # type: ignore[misc]
    """Learn a truncated Dirichlet-process mixture of Gaussians by variational inference.

    The updates, the lower bound and its use as a stop are scikit-learn's for the Dirichlet process, and the
    same `random_state` starts from the same responsibilities. float64 rows give its numbers up to rounding.
    With float32 rows sums and responsibilities carry float32 rounding, changes of the bound below it count as
    none, and rows whose mean is many times their spread should be centered first.

    Args:
        n_components: K, where the sticks are cut off.
        covariance_type: "full", "diag" or "spherical"; "tied" is not offered.
        tol: the change of the lower bound below which iterations end.
        reg_covar: added to variances.
        max_iter: iterations at most.
        n_init: starts, of which the one with the largest bound counts.
        init_params: "kmeans", "k-means++", "random" or "random_from_data".
        weight_concentration_prior_type: "dirichlet_process".
        weight_concentration_prior: α; None is 1 / K.
        mean_precision_prior: None is 1.
        mean_prior: (D,); None is the mean of the rows.
        degrees_of_freedom_prior: above D − 1; None is D.
        covariance_prior: (D, D), (D,) or a number; None is the covariance of the rows.
        random_state: of starts and samples.
        warm_start: whether `fit` goes on from the last one.
        verbose: kept and not used.
        verbose_interval: kept and not used.

    Attributes:
        weights_, means_, covariances_, precisions_, precisions_cholesky_: (K, ...), of the expected mixture.
        weight_concentration_: the two parameters of the sticks, (K,) each.
        mean_precision_, degrees_of_freedom_: (K,).
        weight_concentration_prior_, mean_precision_prior_, mean_prior_, degrees_of_freedom_prior_,
            covariance_prior_: the priors in use.
        converged_, n_iter_, lower_bound_: of the best start; after `partial_fit` False, its calls, and the
            bound of all rows seen.
        lower_bounds_: the bound after every iteration of the best start.
        n_features_in_: D.
        All are float64 NumPy arrays, whatever the rows are.

    References:
        Blei and Jordan, "Variational inference for Dirichlet process mixtures", Bayesian Analysis 1, 2006.
        Neal and Hinton, "A view of the EM algorithm that justifies incremental, sparse, and other variants",
        1998 (`partial_fit`).

    >>> rows = np.random.default_rng(0).normal(size=(60, 2)) + np.repeat([[0], [9], [9]], 20, axis=0)
    >>> mixture = BayesianGaussianMixture(n_components=4, random_state=0).fit(rows)
    >>> len(set(mixture.predict(rows[:20])) & set(mixture.predict(rows[20:])))
    0
    >>> sorted(mixture.means_[mixture.weights_ > 0.1].round().astype(int).tolist())
    [[0, 0], [9, 9]]
    """

    def __init__(
        self,
        *,
        n_components: int = 1,
        covariance_type: str = "full",
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int = 1,
        init_params: str = "kmeans",
        weight_concentration_prior_type: str = "dirichlet_process",
        weight_concentration_prior: float | None = None,
        mean_precision_prior: float | None = None,
        mean_prior: Any = None,
        degrees_of_freedom_prior: float | None = None,
        covariance_prior: Any = None,
        random_state: Any = None,
        warm_start: bool = False,
        verbose: int = 0,
        verbose_interval: int = 10,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.init_params = init_params
        self.weight_concentration_prior_type = weight_concentration_prior_type
        self.weight_concentration_prior = weight_concentration_prior
        self.mean_precision_prior = mean_precision_prior
        self.mean_prior = mean_prior
        self.degrees_of_freedom_prior = degrees_of_freedom_prior
        self.covariance_prior = covariance_prior
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose
        self.verbose_interval = verbose_interval

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn from rows (N, D), N >= K.

        Raises:
            ValueError: a parameter out of range, fewer rows than components, or NaN among them.
        """
        rows, prior = self._begin(X)
        goes_on = self.warm_start and hasattr(self, "converged_")
        random_state = check_random_state(self.random_state)
        floor = torch.finfo(result_dtype(rows)).eps
        best: tuple[list[float], bool, Posterior, Statistics] | None = None
        for _ in range(1 if goes_on else self.n_init):
            posterior = self._posterior(rows) if goes_on else self._start(rows, prior, random_state)
            bounds, converged = [-math.inf], False
            for _ in range(self.max_iter):
                log_likelihood, found = posterior.expect(rows)
                posterior = maximize(prior, found, self.reg_covar)
                bounds.append(posterior.bound(found.entropy))
                noise = floor * float(log_likelihood.double().abs().sum())
                converged = abs(bounds[-1] - bounds[-2]) < max(self.tol, noise)
                if converged:
                    break
            if best is None or bounds[-1] > best[0][-1]:
                best = bounds, converged, posterior, found
        assert best is not None
        bounds, self.converged_, posterior, self._statistics = best
        if not self.converged_:
            warnings.warn(
                f"The best of {self.n_init} starts did not converge in {self.max_iter} iterations; raise "
                "max_iter or tol, or look at the rows.",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.lower_bounds_, self.n_iter_, self.lower_bound_ = bounds[1:], len(bounds) - 1, bounds[-1]
        self._publish(posterior)
        return self

    def fit_predict(self, X: Any, y: Any = None) -> Any:
        """Learn from rows and give their components (N,)."""
        return self.fit(X).predict(X)

    def partial_fit(self, X: Any, y: Any = None) -> Self:
        """Learn from further rows (N, D), each of which is looked at once.

        The rows' responsibilities under the present posterior are added to those of all earlier rows, and the
        posterior becomes the optimal one for their sum, which raises the lower bound of all rows seen.
        Nothing is forgotten, and earlier rows keep their responsibilities, so a `fit` to all rows goes
        further. The first call takes the start and the priors that are not given from its rows, at least K.

        Raises:
            ValueError: a parameter out of range, too few rows at first, another D, or NaN.
        """
        if not hasattr(self, "_statistics"):
            rows, prior = self._begin(X)
            posterior = self._start(rows, prior, check_random_state(self.random_state))
            found, calls = posterior.expect(rows)[1], 0
        else:
            rows = rows_of(self, X)
            posterior, prior, calls = self._posterior(rows), self._kept_prior(rows), self.n_iter_
            found = posterior.expect(rows)[1] + _beside(self._statistics, rows)
        posterior = maximize(prior, found, self.reg_covar)
        self._statistics, self.converged_, self.n_iter_ = found, False, calls + 1
        self.lower_bound_ = posterior.bound(found.entropy)
        self._publish(posterior)
        return self

    def score_samples(self, X: Any) -> Any:
        """Give the log-density of rows (N,), by the expected log-densities of the components."""
        check_is_fitted(self)
        rows = rows_of(self, X)
        return like(self._posterior(rows).expect(rows)[0], X)

    def score(self, X: Any, y: Any = None) -> float:
        """Give the mean of `score_samples`: higher is more normal."""
        check_is_fitted(self)
        rows = rows_of(self, X)
        return float(self._posterior(rows).expect(rows)[0].double().mean())

    def predict(self, X: Any) -> Any:
        """Give the component of the largest responsibility, (N,)."""
        check_is_fitted(self)
        rows = rows_of(self, X)
        return like(self._posterior(rows).log_joint(rows).argmax(1), X)

    def predict_proba(self, X: Any) -> Any:
        """Give the responsibilities (N, K)."""
        check_is_fitted(self)
        rows = rows_of(self, X)
        return like(self._posterior(rows).log_joint(rows).softmax(1).to(result_dtype(rows)), X)

    def sample(self, n_samples: int = 1) -> tuple[Any, Any]:
        """Draw rows (N, D) from the expected mixture, and their components (N,), in the components' order.

        Raises:
            ValueError: not fitted, or fewer than 1.
        """
        check_is_fitted(self)
        check_whole(1, n_samples=n_samples)
        random_state = check_random_state(self.random_state)
        counts = random_state.multinomial(n_samples, self.weights_)
        rows = []
        for mean, spread, n in zip(self.means_, self.covariances_, counts, strict=True):
            if self.covariance_type == "full":
                rows.append(random_state.multivariate_normal(mean, spread, int(n)))
            else:
                rows.append(mean + random_state.standard_normal((n, len(mean))) * np.sqrt(spread))
        return np.vstack(rows), np.repeat(np.arange(len(counts)), counts)

    def _begin(self, X: Any) -> tuple[Tensor, Prior]:
        """Check parameters and rows, and settle the priors."""
        check_whole(1, n_components=self.n_components, max_iter=self.max_iter, n_init=self.n_init)
        check_number(0, tol=self.tol, reg_covar=self.reg_covar)
        check_choice(KINDS, covariance_type=self.covariance_type)
        check_choice(STARTS, init_params=self.init_params)
        check_choice(
            ("dirichlet_process",), weight_concentration_prior_type=self.weight_concentration_prior_type
        )
        rows = rows_of(self, X, reset=True)
        if len(rows) < self.n_components:
            raise InputError(
                f"Expected n_samples >= n_components but got n_components = {self.n_components}, "
                f"n_samples = {len(rows)}"
            )
        d, kind, middle = rows.shape[1], self.covariance_type, rows.mean(0, dtype=torch.float64)
        alpha, beta = self.weight_concentration_prior, self.mean_precision_prior
        nu, mean, covariance = self.degrees_of_freedom_prior, self.mean_prior, self.covariance_prior
        self.weight_concentration_prior_ = 1 / self.n_components if alpha is None else alpha
        self.mean_precision_prior_ = 1.0 if beta is None else beta
        self.degrees_of_freedom_prior_ = d if nu is None else nu
        check_number(0, above=True, weight_concentration_prior=self.weight_concentration_prior_)
        check_number(0, above=True, mean_precision_prior=self.mean_precision_prior_)
        check_number(d - 1, above=True, degrees_of_freedom_prior=self.degrees_of_freedom_prior_)
        self.mean_prior_ = _given("mean_prior", mean, (d,)) if mean is not None else _host(middle)
        if covariance is not None:
            shape = {"full": (d, d), "diag": (d,), "spherical": ()}[kind]
            self.covariance_prior_ = _given("covariance_prior", covariance, shape)
        else:
            spread = _host(_spread(rows, middle, kind == "full"))
            self.covariance_prior_ = spread.mean() if kind == "spherical" else spread
        return rows, self._kept_prior(rows)

    def _kept_prior(self, rows: Tensor) -> Prior:
        return Prior(
            self.weight_concentration_prior_,
            self.mean_precision_prior_,
            _float64(self.mean_prior_, rows),
            self.degrees_of_freedom_prior_,
            _float64(self.covariance_prior_, rows),
        )

    def _start(self, rows: Tensor, prior: Prior, random_state: Any) -> Posterior:
        """Draw responsibilities and give the posterior that is optimal for them."""
        n, k = len(rows), self.n_components
        resp = rows.new_zeros(n, k, dtype=torch.float64)
        every = torch.arange(k, device=rows.device)
        if self.init_params == "kmeans":
            labels = KMeans(k, n_init=1, random_state=random_state).fit(rows).labels_
            resp[torch.arange(n, device=rows.device), labels.long()] = 1
        elif self.init_params == "random":
            drawn = random_state.uniform(size=(n, k))
            resp = _float64(drawn / drawn.sum(axis=1, keepdims=True), rows)
        elif self.init_params == "random_from_data":
            chosen = random_state.choice(n, size=k, replace=False)
            resp[torch.as_tensor(chosen, device=rows.device), every] = 1
        else:
            plain = rows.to(result_dtype(rows)).cpu().numpy()
            chosen = kmeans_plusplus(plain, k, random_state=random_state)[1]
            resp[torch.as_tensor(chosen, device=rows.device), every] = 1
        return maximize(prior, assigned(rows, resp, self.covariance_type), self.reg_covar)

    def _publish(self, posterior: Posterior) -> None:
        self.weights_ = _host(posterior.weights)
        self.weight_concentration_ = tuple(_host(part) for part in posterior.sticks)
        self.mean_precision_ = _host(posterior.mean_precision)
        self.degrees_of_freedom_ = _host(posterior.degrees_of_freedom)
        self.means_ = _host(posterior.means)
        self.covariances_ = _host(posterior.covariances)
        if self.covariance_type == "full":
            factor = torch.linalg.cholesky(posterior.covariances)
            unit = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
            upper = torch.linalg.solve_triangular(factor, unit.expand_as(factor), upper=False).mT
            self.precisions_cholesky_, self.precisions_ = _host(upper), _host(upper @ upper.mT)
        else:
            self.precisions_cholesky_ = 1 / np.sqrt(self.covariances_)
            self.precisions_ = 1 / self.covariances_

    def _posterior(self, rows: Tensor) -> Posterior:
        a, b = self.weight_concentration_
        return Posterior(
            (_float64(a, rows), _float64(b, rows)),
            _float64(self.mean_precision_, rows),
            _float64(self.degrees_of_freedom_, rows),
            _float64(self.means_, rows),
            _float64(self.covariances_, rows),
        )


def _given(name: str, value: Any, shape: tuple[int, ...]) -> Any:
    found = np.asarray(value, dtype=np.float64)
    if found.shape != shape or not np.isfinite(found).all():
        raise InputError(f"{name} must be finite and of shape {shape}, got {found.shape}")
    return found


def _spread(rows: Tensor, mean: Tensor, full: bool) -> Tensor:
    """Give the unbiased covariance (D, D) of rows, or variances (D,), float64; the unit for a single row."""
    total = torch.zeros(len(mean), len(mean) if full else 1, dtype=torch.float64, device=rows.device)
    if len(rows) == 1:
        return total.fill_diagonal_(1) if full else total[:, 0] + 1
    for block in row_blocks(rows, BLOCK // len(mean)):
        gap = block.double() - mean
        total += gap.T @ gap if full else gap.square().sum(0)[:, None]
    total /= len(rows) - 1
    return total if full else total[:, 0]


def _host(tensor: Tensor) -> Any:
    return tensor.cpu().numpy()


def _float64(array: Any, rows: Tensor) -> Tensor:
    return torch.as_tensor(array, dtype=torch.float64, device=rows.device)


def _beside(found: Statistics, rows: Tensor) -> Statistics:
    count, first, second, entropy = (part.to(rows.device) for part in vars(found).values())
    return Statistics(count, first, second, entropy)
