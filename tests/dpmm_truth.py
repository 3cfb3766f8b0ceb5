"""A second derivation of the DPMM's steps and scores in NumPy, and what it is fitted on."""

import numpy as np
import torch
from scipy.special import digamma, logsumexp

from dinofast.models import mixture_start
from dinofast.types import Features

EPS = float(np.finfo(np.float32).eps)
KINDS = ("diag", "spherical", "full")
COMPATS = ("paper", "anomalydino-dpmm")


def rows(n=400, d=6, clusters=8, seed=0):
    """Rows around a few centers, each with a spread of its own in every channel."""
    draw = np.random.default_rng(seed)
    centers = np.random.default_rng(5).normal(size=(clusters, d))
    spread = np.random.default_rng(6).uniform(0.1, 0.3, size=(clusters, d))
    owner = draw.integers(clusters, size=n)
    return torch.from_numpy(centers[owner] + spread[owner] * draw.normal(size=(n, d))).float()


def images(b=5, h=4, w=5, d=6, seed=0):
    return Features(rows(b * h * w, d, seed=seed).view(b, h, w, d), None, (24, 30))


class Derived:
    """The published recursion with every pair and every outer product written out, in float64."""

    def __init__(self, start, kind, schedule, rate, learn, compat, reg=1e-6):
        self.kind, self.schedule, self.rate, self.learn, self.reg = kind, schedule, rate, learn, reg
        self.closed = compat == "paper"
        self.mu, self.v, self.alpha = (
            np.asarray(x, np.float64) for x in (start.means, start.sticks, start.concentration)
        )
        k, d = self.mu.shape
        wide = np.asarray(start.covariances, np.float64)
        self.sigma = wide if wide.ndim == 3 else np.einsum("kd,de->kde", wide, np.eye(d))
        self.p, self.m, self.c, self.t = np.zeros(k), np.zeros((k, d)), np.zeros((k, d, d)), 0

    def log_pi(self):
        with np.errstate(divide="ignore"):
            left = [np.sum(np.log(1 - self.v[:k])) for k in range(len(self.v))]
            found = np.log(self.v) + left
        if not self.closed:
            with np.errstate(under="ignore"):
                found = np.where(np.exp(found).astype(np.float32) == 0, -np.inf, found)
        return found

    def log_density(self, y):
        found = np.empty((len(y), len(self.mu)))
        for k, (mu, sigma) in enumerate(zip(self.mu, self.sigma, strict=True)):
            form = np.einsum("nd,de,ne->n", y - mu, np.linalg.inv(sigma), y - mu)
            found[:, k] = -0.5 * (form + np.linalg.slogdet(2 * np.pi * sigma)[1])
        return found

    def step(self, y):
        y, n, self.t = np.asarray(y, np.float64), len(y), self.t + 1
        joint = self.log_pi() + self.log_density(y)
        total = logsumexp(joint, axis=1)
        r = np.exp(joint - total[:, None])
        g = {"ema": self.rate, "exp": self.t**-self.rate, None: 1.0}[self.schedule]
        self.p = (1 - g) * self.p + g * r.mean(0)
        self.m = (1 - g) * self.m + g * np.einsum("nk,nd->kd", r, y) / n
        self.c = (1 - g) * self.c + g * np.einsum("nk,nd,ne->kde", r, y, y) / n
        k, d = self.mu.shape
        for i in range(k):
            self.mu[i] = self.m[i] / (self.p[i] + EPS)
            full = self.c[i] / (self.p[i] + EPS) - np.outer(self.mu[i], self.mu[i]) + self.reg * np.eye(d)
            if self.kind == "diag":
                full = np.diag(np.diag(full))
            if self.kind == "spherical":
                full = np.eye(d) * np.trace(full) / d
            self.sigma[i] = full
        after = np.array([self.p[i + 1 :].sum() for i in range(k)])
        self.v = self.p / (self.p + (self.alpha - 1) / n + after + EPS)
        if self.closed:
            self.v[-1] = 1
        if self.learn:
            a = self.alpha
            ends = [
                digamma(n * (self.p[i] + after[i]) + a + 1) - digamma(n * after[i] + a) for i in range(k - 1)
            ]
            self.alpha = max(1.0, (k - 1) / sum(ends))
        return total

    def kept(self, rescaled, threshold=1e-6):
        pi = np.exp(self.log_pi())
        found = (pi / pi.sum() if rescaled and not self.closed else pi) > threshold
        if self.closed and self.p[-1] <= EPS:
            found[-1] = False
        return found

    def score(self, y, scoring):
        y = np.asarray(y, np.float64)
        a = self.kept(scoring in ("cosine", "euclidean", "mahalanobis"))
        mu, density = self.mu[a], self.log_density(y)[:, a]
        gaps = y[:, None] - mu
        if scoring == "cosine":
            lengths = np.linalg.norm(y, axis=1)[:, None] * np.linalg.norm(mu, axis=1)
            return 1 - (y @ mu.T / lengths).max(1)
        if scoring == "euclidean":
            return np.linalg.norm(gaps, axis=2).min(1)
        if scoring == "mahalanobis":
            return np.sqrt(np.einsum("nkd,kde,nke->nk", gaps, np.linalg.inv(self.sigma[a]), gaps).min(1))
        if scoring == "likelihood":
            return -density.max(1)
        return -logsumexp(density + self.log_pi()[a], axis=1)


def near(found, expected, within=1e-5):
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=within, atol=within)


def same_parameters(found, derived, within=1e-5):
    full = derived.kind == "full"
    for name, expected in {
        "mass": derived.p,
        "first": derived.m,
        "second": derived.c if full else np.einsum("kdd->kd", derived.c),
        "sticks": derived.v,
        "concentration": derived.alpha,
        "means": derived.mu,
        "covariances": derived.sigma if full else np.einsum("kdd->kd", derived.sigma),
    }.items():
        near(getattr(found, name), expected, within)


def started(kind="diag", init="k-means++", k=7, x=None, seed=0):
    return mixture_start.start(
        rows() if x is None else x, k, init, concentration=2.0, reg_covar=1e-6, full=kind == "full", seed=seed
    )
