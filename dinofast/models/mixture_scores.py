"""What a mixture says of rows: distances to its components, densities, and which component they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from dinofast.errors import InputError
from dinofast.models.mixture import Mixture, Quadratic, Rule
from dinofast.ops import cosine_max, knn_topk
from dinofast.ops.rows import normalize_rows

DISTANCES = ("cosine", "euclidean", "mahalanobis")
SCORINGS = (*DISTANCES, "likelihood", "mixture")


@dataclass(frozen=True)
class Active:
    """The components that take part, A of K.

    Attributes:
        index: (A,), int64: their numbers among the K, ascending.
        means: (A, D).
        directions: (A, D): means at unit length.
        covariances: (A, D) or (A, D, D).
        log_weights: (A,), float64, as in the mixture: not scaled to sum to 1.
    """

    index: Tensor
    means: Tensor
    directions: Tensor
    covariances: Tensor
    log_weights: Tensor

    @cached_property
    def quadratic(self) -> Quadratic:
        """What densities are computed from, factorized at the first use and kept."""
        return Quadratic.of(self.means, self.covariances)

    def to(self, device: str | torch.device) -> Active:
        """Copy to a device, what densities are computed from included."""
        moved = Active(*(getattr(self, field.name).to(device) for field in fields(self)))
        moved.__dict__["quadratic"] = self.quadratic.to(device)
        return moved

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, after what densities are computed from was prepared."""
        tensors = [*vars(self.quadratic).values(), *vars(self).values()]
        return sum(x.nbytes for x in tensors if isinstance(x, Tensor))


class ActiveOfState:
    """The active components of one state, chosen once and kept until another state is asked for."""

    def __init__(self) -> None:
        self._state: Mapping[str, Tensor] = {}
        self._found: dict[bool, Active] = {}

    def of(self, state: Mapping[str, Tensor], rule: Rule, threshold: float, rescaled: bool) -> Active:
        """Give them; see `active`."""
        if self._state is not state:
            self._state, self._found = state, {}
        if rescaled not in self._found:
            self._found[rescaled] = active(Mixture.of(state), rule, threshold, rescaled=rescaled)
        return self._found[rescaled]

    def follow(
        self, before: Mapping[str, Tensor], state: Mapping[str, Tensor], device: str | torch.device
    ) -> None:
        """Keep what was found of a state that has moved to a device."""
        if self._state is before:
            self._state, self._found = state, {name: x.to(device) for name, x in self._found.items()}


def active(mixture: Mixture, rule: Rule, threshold: float, *, rescaled: bool) -> Active:
    """Choose the components with π above a threshold.

    Where the rule closes the last stick, its component gets what weight the others leave, and takes part only
    when its mass exceeds `rule.eps`.

    Args:
        mixture: of any state.
        rule: that it is learned by.
        threshold: at least 0.
        rescaled: whether the threshold applies to weights scaled to sum to 1.

    Raises:
        InputError: none is left.
    """
    log_weights = rule.log_weights(mixture.sticks)
    shares = log_weights.softmax(0) if rescaled else log_weights.exp()
    kept = shares > threshold
    if rule.closed:
        kept[-1] &= mixture.mass[-1] > rule.eps
    index = kept.nonzero()[:, 0]
    if len(index) == 0:
        raise InputError(
            f"no component has a weight above weight_threshold = {threshold}, the largest is "
            f"{float(shares.max()):.3g}; lower it, or learn from more images."
        )
    means = mixture.means[index]
    return Active(index, means, normalize_rows(means), mixture.covariances[index], log_weights[index])


def score_rows(x: Tensor, parts: Active, scoring: str) -> Tensor:
    """Score rows (N, D) as `DPMM` says of `scoring`, one of `SCORINGS`; gives (N,), float32."""
    if scoring == "cosine":
        return 1 - cosine_max(x, parts.directions)[0]
    if scoring == "euclidean":
        return knn_topk(x, parts.means, 1, "euclidean")[0][:, 0]
    if scoring == "mixture":
        return -log_likelihood(x, parts)
    constant, forms = parts.quadratic.constant, parts.quadratic.blocks(x)
    if scoring == "mahalanobis":
        found = [form.amin(1).sqrt() for form in forms]
    else:
        found = [(0.5 * form - constant).amin(1) for form in forms]
    return torch.cat(found).float()


def log_likelihood(x: Tensor, parts: Active) -> Tensor:
    """Give ln Σ π N(x) (N,) over the active components, in nats."""
    constant, forms = parts.quadratic.constant, parts.quadratic.blocks(x)
    found = [(constant + parts.log_weights - 0.5 * form).logsumexp(1) for form in forms]
    return torch.cat(found).float()


def most_likely(x: Tensor, parts: Active) -> Tensor:
    """Give the component (N,), int64, of the largest responsibility, the first among equals."""
    constant, forms = parts.quadratic.constant, parts.quadratic.blocks(x)
    return parts.index[torch.cat([(constant + parts.log_weights - 0.5 * f).argmax(1) for f in forms])]
