"""The class `DPMM` of anomalydino-dpmm, on the mixture of `dinofast.models`: diagonal models stay diagonal.

Steps and scores are the host's, in float32 with float64 masses, sticks and concentration. Not copied, as no
working number depends on it: a diagonal or spherical model keeps (K, D) in place of K × D × D and forms no
N × D × D array; where the host's concentration falls below 1 and a stick other than the last would exceed 1,
which makes the host's weights NaN, the stick is 1; rounding cannot make a covariance indefinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dinofast.drop_in.anomalydino_dpmm_state import exported, imported, responsibilities, square
from dinofast.errors import InputError
from dinofast.interop import like, on_callers_stream, to_tensor
from dinofast.models import mixture_start
from dinofast.models.mixture import FLOAT32_FLOOR, Mixture, Rule, begin, quadratic_blocks, step, update
from dinofast.models.mixture_scores import Active, active, log_likelihood, score_rows
from dinofast.ops.rows import normalize_rows

COVARIANCE_TYPES = ("full", "diag", "spherical")


@on_callers_stream
class DPMM:
    """Learn a Dirichlet-process mixture of Gaussians batch by batch, and score rows by it.

    Rows are (N, D) NumPy, torch or CuPy arrays; results are of the kind that came in. Random choices follow
    torch's global generator, as the host's do.

    Args:
        K: components, at least 1.
        D: channels.
        update_rate: step size γ of "ema", or exponent of "exp": step t has the size t^(−update_rate). None
            forgets all earlier batches at every step.
        schedule: "ema" or "exp".
        alpha: concentration α, at least 1.
        alpha_fixed: whether α is not learned.
        eps: added to denominators; None is that of float32.
        cov_type: "full", "diag" or "spherical".
        reg_covar: added to variances.
        device: where the state lies and rows are brought to.

    Attributes:
        iterations: steps made.
        alpha: α, a tensor (); it may be assigned a number. It is not part of `state_dict`, as in the host, so
            save it beside when training goes on later.
        resp_stat, mean_stat, cov_stat, v, mean, cov: see below; all are float32.

    Raises:
        InputError: a parameter out of range.

    References:
        Schulthess and Konukoglu, "Anomaly detection by clustering DINO embeddings using a Dirichlet process
        mixture", MICCAI 2025, arXiv 2509.19997.

    >>> rows = torch.randn(64, 4)
    >>> mixture = DPMM(K=5, D=4, update_rate=0.2, cov_type="diag")
    >>> mixture.initialize(rows)
    >>> mixture.step(rows)
    >>> mixture.iterations, tuple(mixture.cov.shape), tuple(mixture.sample_score(rows).shape)
    (1, (5, 4, 4), (64,))
    """

    def __init__(
        self,
        K: int,
        D: int,
        update_rate: float | None = None,
        schedule: str = "ema",
        alpha: float = 2.0,
        alpha_fixed: bool = False,
        eps: float | None = None,
        cov_type: str = "full",
        reg_covar: float = 1e-6,
        device: str | torch.device = "cpu",
    ) -> None:
        if min(K, D) < 1:
            raise InputError(f"K and D must be at least 1, got {K} and {D}")
        if cov_type not in COVARIANCE_TYPES:
            raise InputError(f"cov_type {cov_type!r}: one of {', '.join(COVARIANCE_TYPES)}")
        if not 1 <= alpha < math.inf:
            raise InputError(f"alpha must be finite and at least 1, got {alpha}")
        self.K, self.D, self.cov_type, self.device = K, D, cov_type, torch.device(device)
        self._rule = Rule(
            spherical=cov_type == "spherical",
            schedule=schedule,
            update_rate=update_rate,
            learn_concentration=not alpha_fixed,
            eps=torch.finfo(torch.float32).eps if eps is None else eps,
            reg_covar=reg_covar,
            closed=False,
            floor=FLOAT32_FLOOR,
            bounded=False,
        )
        self._alpha = float(alpha)
        self._mixture: Mixture | None = None

    def initialize(self, data: Any = None) -> None:
        """Start anew: sticks from Beta(1, α) with the last one 1, no statistics.

        Args:
            data: rows (N, D). The first min(K, N) in random order become means, further means are drawn from
                N(0, I), and every covariance is the variance of the rows plus `reg_covar`. None draws all
                means and takes the unit matrix.

        Raises:
            InputError: no rows (N, D), or NaN among them.
        """
        seed, full = int(torch.randint(1 << 62, ()).item()), self.cov_type == "full"
        if data is None:
            none = torch.zeros(0, self.D, device=self.device)
            means, sticks = mixture_start.first_rows(none, self.K, self._alpha, seed)
            variance = torch.ones(self.D, device=self.device)
            self._mixture = begin(means, variance, sticks, self._alpha, full=full)
            return
        rows = self._rows(data).float()
        if not len(rows):
            raise InputError("data has no rows; give initialize the first batch, or None")
        self._mixture = mixture_start.start(
            rows,
            self.K,
            "first-rows",
            concentration=self._alpha,
            reg_covar=self._rule.reg_covar,
            full=full,
            seed=seed,
        )

    def step(self, data: Any) -> None:
        """Make one step of expectation and maximization on rows (N, D), N >= 1.

        Raises:
            InputError: not initialized, no rows, or NaN among them; the state is then as it was.
        """
        rows = self._rows(data)
        if not len(rows):
            raise InputError("data has no rows to learn from")
        self._mixture = step(self._state, rows, self._rule)[0]

    def e_step(self, data: Any) -> Any:
        """Give the log-responsibilities (N, K) of rows (N, D)."""
        return self.get_log_responsibilities(data)

    def m_step(self, data: Any, resp: Any) -> None:
        """Bring the state up to date from rows and their responsibilities; `step` needs no such matrix.

        Args:
            data: rows (N, D), N >= 1.
            resp: responsibilities (N, K) in [0, 1], each row summing to 1 within a hundredth, or their
                logarithms; a matrix with a negative number, or of zeros only, is taken for these.

        Raises:
            InputError: not initialized, shapes that do not belong together, no responsibilities, or NaN; the
                state is then as it was.
        """
        rows, shares = self._rows(data).double(), to_tensor(resp, "resp").to(self.device).double()
        if not len(rows) or shares.shape != (len(rows), self.K):
            raise InputError(f"resp must be ({len(rows)}, {self.K}) with rows, got {tuple(shares.shape)}")
        shares = responsibilities(shares)
        if self.cov_type == "full":
            second = torch.stack([(rows * share[:, None]).T @ rows for share in shares.T])
        else:
            second = shares.T @ rows.square()
        after = update(self._state, shares.sum(0), shares.T @ rows, second, len(rows), self._rule)
        if not all(bool(part.isfinite().all()) for part in (after.means, after.covariances)):
            raise InputError("data or resp hold NaN or infinite values; remove those rows")
        self._mixture = after

    def calculate_pi(self) -> Tensor:
        """Give the weights (K,), scaled to sum to 1."""
        return self.calculate_log_pi().softmax(0)

    def calculate_log_pi(self) -> Tensor:
        """Give the logarithms of the weights (K,) as the sticks have them, not scaled to sum to 1."""
        return replace(self._rule, floor=-math.inf).log_weights(self._state.sticks).float()

    def get_log_prob(self, x: Any, weight_threshold: float | None = None) -> Any:
        """Give ln N(x | k) of every row and component.

        Args:
            x: rows (N, D) or (N, 1, D).
            weight_threshold: components with a weight at most this get −inf; None leaves all in.

        Returns:
            (N, K), float32; NaN for rows with NaN.
        """
        return like(self._log_prob(x, weight_threshold).float(), x)

    def get_weighted_log_prob(self, x: Any, weight_threshold: float | None = None) -> Any:
        """Give ln π_k N(x | k) (N, K); a weight that is 0 in float32 gives −inf. See `get_log_prob`."""
        return like(self._weighted(x, weight_threshold).float(), x)

    def get_log_responsibilities(self, x: Any, weight_threshold: float | None = None) -> Any:
        """Give ln r (N, K), whose exp sums to 1 in every row. See `get_log_prob`."""
        return like(self._weighted(x, weight_threshold).log_softmax(1).float(), x)

    def get_responsibilities(self, x: Any, weight_threshold: float | None = None) -> Any:
        """Give r (N, K). See `get_log_prob`."""
        return like(self._weighted(x, weight_threshold).softmax(1).float(), x)

    def sample_score(self, x: Any, weight_threshold: float = 1e-6) -> Any:
        """Give ln Σ_k π_k N(x | k) (N,), higher being more normal.

        Args:
            x: rows (N, D).
            weight_threshold: components with a weight, by `calculate_log_pi`, at most this are left out.

        Raises:
            InputError: not initialized, another D, or no component is left.
        """
        return like(log_likelihood(self._rows(x), self._active(weight_threshold, rescaled=False)), x)

    def score(self, x: Any, weight_threshold: float = 1e-6) -> Any:
        """Give the mean of `sample_score` over the rows, ()."""
        return like(to_tensor(self.sample_score(x, weight_threshold)).mean(), x)

    def distance_to_nearest_cluster(
        self,
        x: Any,
        weight_threshold: float = 1e-6,
        covariance_weighted_norm: bool = False,
        return_min: bool = True,
    ) -> Any:
        """Give the Euclidean or Mahalanobis distance to the nearest component.

        Args:
            x: rows (N, D).
            weight_threshold: components with a weight, as `calculate_pi` has it, at most this are left out.
            covariance_weighted_norm: whether a component's covariance measures the distance to it.
            return_min: False gives the distance to every component.

        Returns:
            (N,), or (N, K) with inf for components left out.

        Raises:
            InputError: not initialized, another D, or no component is left.
        """
        if covariance_weighted_norm:
            return self._distances(x, weight_threshold, "mahalanobis", _mahalanobis, return_min)
        return self._distances(x, weight_threshold, "euclidean", _euclidean, return_min)

    def cosine_distance_to_nearest_cluster(
        self, x: Any, weight_threshold: float = 1e-6, return_min: bool = True
    ) -> Any:
        """Give 1 − the cosine to the mean it is largest for: the published score. As the distances above."""
        return self._distances(x, weight_threshold, "cosine", _cosine, return_min)

    def sample(self, n: int) -> Tensor:
        """Draw n rows (n, D) from the mixture with weights scaled to sum to 1."""
        state = self._state
        drawn = torch.multinomial(self.calculate_pi().double().cpu(), n, replacement=True)
        noise = torch.randn(n, self.D).to(state.means)
        rows = torch.empty_like(noise)
        for k in sorted(set(drawn.tolist())):
            own = (drawn == k).to(self.device)
            if self.cov_type == "full":
                spread = noise[own] @ torch.linalg.cholesky(state.covariances[k]).T
            else:
                spread = noise[own] * state.covariances[k].sqrt()
            rows[own] = state.means[k] + spread
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Give the state in the host's keys and shapes, copied: covariances are (K, D, D), α is left out."""
        return exported(self._state)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state of the host's or of this class; α stays unless `alpha` is among the keys.

        Args:
            state_dict: the keys of `state_dict`; of (K, D, D) arrays only the diagonals count unless "full".

        Raises:
            InputError: keys are missing, shapes are others, NaN or infinite values, or covariances that are
                not positive definite; the state is then as it was.
        """
        self._mixture = imported(
            state_dict,
            self.K,
            self.D,
            full=self.cov_type == "full",
            device=self.device,
            alpha=float(self.alpha),
        )

    @property
    def iterations(self) -> int:
        """Steps made."""
        return self._state.iteration

    @property
    def alpha(self) -> Tensor:
        """Concentration α, ()."""
        if self._mixture is None:
            return torch.tensor(self._alpha, device=self.device)
        return self._mixture.concentration.float()

    @alpha.setter
    def alpha(self, value: float | Tensor) -> None:
        number = float(value)
        if not 0 < number < math.inf:
            raise InputError(f"alpha must be finite and above 0, got {number}")
        self._alpha = number
        if self._mixture is not None:
            concentration = torch.full_like(self._mixture.concentration, number)
            self._mixture = replace(self._mixture, concentration=concentration)

    @property
    def resp_stat(self) -> Tensor:
        """Running mean of the responsibilities (K,)."""
        return self._state.mass.float()

    @property
    def mean_stat(self) -> Tensor:
        """Running mean of responsibility times row (K, D)."""
        return self._state.first

    @property
    def cov_stat(self) -> Tensor:
        """Running second moment (K, D, D)."""
        return square(self._state.second)

    @property
    def v(self) -> Tensor:
        """Sticks (K,)."""
        return self._state.sticks.float()

    @property
    def mean(self) -> Tensor:
        """Component means (K, D)."""
        return self._state.means

    @property
    def cov(self) -> Tensor:
        """Component covariances (K, D, D)."""
        return square(self._state.covariances)

    @property
    def _state(self) -> Mixture:
        if self._mixture is None:
            raise InputError("this mixture has no state; call initialize or load_state_dict first")
        return self._mixture

    def _rows(self, x: Any) -> Tensor:
        rows = to_tensor(x, "x").detach()
        if rows.dim() == 3 and rows.shape[1] == 1:
            rows = rows[:, 0]
        if rows.dim() != 2 or rows.shape[1] != self.D:
            raise InputError(f"rows must be (N, {self.D}), got {tuple(rows.shape)}")
        half = rows.dtype in (torch.float16, torch.bfloat16)
        return rows.to(self.device, rows.dtype if half else torch.float32)

    def _active(self, threshold: float, *, rescaled: bool) -> Active:
        return active(self._state, self._rule, threshold, rescaled=rescaled)

    def _log_prob(self, x: Any, threshold: float | None) -> Tensor:
        constant, forms = quadratic_blocks(self._rows(x), self._state.means, self._state.covariances)
        found = torch.cat([constant - 0.5 * form for form in forms])
        if threshold is not None:
            found[:, self.calculate_log_pi().exp() <= threshold] = -torch.inf
        return found

    def _weighted(self, x: Any, threshold: float | None) -> Tensor:
        return self._log_prob(x, threshold) + self._rule.log_weights(self._state.sticks)

    def _distances(
        self,
        x: Any,
        threshold: float,
        scoring: str,
        dense: Callable[[Tensor, Active], Tensor],
        return_min: bool,
    ) -> Any:
        rows, parts = self._rows(x), self._active(threshold, rescaled=True)
        if return_min:
            return like(score_rows(rows, parts, scoring), x)
        found = torch.full((len(rows), self.K), torch.inf, device=self.device)
        found[:, parts.index] = dense(rows, parts)
        return like(found, x)


def _cosine(x: Tensor, parts: Active) -> Tensor:
    return 1 - normalize_rows(x) @ parts.directions.T


def _euclidean(x: Tensor, parts: Active) -> Tensor:
    return torch.cdist(x.float(), parts.means, compute_mode="donot_use_mm_for_euclid_dist")


def _mahalanobis(x: Tensor, parts: Active) -> Tensor:
    _, forms = quadratic_blocks(x, parts.means, parts.covariances)
    return torch.cat(list(forms)).sqrt().float()
