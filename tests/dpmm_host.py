"""The equations of the published mixture's class in NumPy, and models of random states."""

import numpy as np
import torch
from scipy.special import digamma, logsumexp

from dinofast.drop_in.anomalydino_dpmm import DPMM

EPS = float(np.finfo(np.float32).eps)
KINDS = ("full", "diag", "spherical")
K, D = 5, 4


def rows(n=300, d=D, seed=0):
    draw = np.random.default_rng(seed)
    centers = np.random.default_rng(5).normal(size=(K + 1, d))
    return (centers[draw.integers(K + 1, size=n)] + 0.2 * draw.normal(size=(n, d))).astype(np.float32)


class Host:
    """One state of the published recursion and what is asked of it, pair by pair in float64."""

    def __init__(self, state, alpha, kind, schedule, rate, learn=True, reg=1e-6):
        wide = {key: np.asarray(value, np.float64) for key, value in state.items()}
        self.t, self.p, self.m, self.c = (
            wide[n] for n in ("iterations", "resp_stat", "mean_stat", "cov_stat")
        )
        self.v, self.mu, self.sigma, self.alpha = wide["v"], wide["mean"], wide["cov"], float(alpha)
        self.kind, self.schedule, self.rate, self.learn, self.reg = kind, schedule, rate, learn, reg

    def log_pi(self):
        with np.errstate(divide="ignore"):
            return np.array([np.log(v) + np.log(1 - self.v[:k]).sum() for k, v in enumerate(self.v)])

    def log_density(self, y):
        found = np.empty((len(y), len(self.mu)))
        for k, (mu, sigma) in enumerate(zip(self.mu, self.sigma, strict=True)):
            form = np.einsum("nd,de,ne->n", y - mu, np.linalg.inv(sigma), y - mu)
            found[:, k] = -0.5 * (form + np.linalg.slogdet(2 * np.pi * sigma)[1])
        return found

    def joint(self, y):
        weight = self.log_pi()
        with np.errstate(under="ignore"):
            weight[np.exp(weight).astype(np.float32) == 0] = -np.inf
        return self.log_density(y) + weight

    def step(self, y):
        y, n, self.t = y.astype(np.float64), len(y), self.t + 1
        joint = self.joint(y)
        r = np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
        g = 1.0 if self.rate is None else self.rate if self.schedule == "ema" else self.t**-self.rate
        self.p = (1 - g) * self.p + g * r.mean(0)
        self.m = (1 - g) * self.m + g * np.einsum("nk,nd->kd", r, y) / n
        self.c = (1 - g) * self.c + g * np.einsum("nk,nd,ne->kde", r, y, y) / n
        size, d = self.mu.shape
        self.mu = self.m / (self.p + EPS)[:, None]
        for k in range(size):
            found = self.c[k] / (self.p[k] + EPS) - np.outer(self.mu[k], self.mu[k]) + self.reg * np.eye(d)
            if self.kind != "full":
                found = np.diag(np.diag(found))
            if self.kind == "spherical":
                found = np.eye(d) * np.trace(found) / d
            self.sigma[k] = found
        after = np.array([self.p[k + 1 :].sum() for k in range(size)])
        old = self.alpha
        self.v = self.p / (self.p + (old - 1) / n + after + EPS)
        if self.learn:
            ends = digamma(n * (self.p + after) + old + 1) - digamma(n * after + old)
            self.alpha = (size - 1) / ends[:-1].sum()
        return r

    def same(self, model, within=1e-5):
        state = model.state_dict()
        assert state["iterations"] == self.t
        matrices = [self.sigma, self.c]
        if self.kind != "full":
            matrices = [np.einsum("kdd,de->kde", m, np.eye(m.shape[1])) for m in matrices]
        expected = dict(zip(("cov", "cov_stat"), matrices, strict=True))
        expected |= {"resp_stat": self.p, "mean_stat": self.m, "v": self.v, "mean": self.mu}
        for key, value in expected.items():
            np.testing.assert_allclose(state[key], value, rtol=within, atol=within, err_msg=key)
            assert torch.equal(getattr(model, key), state[key])
        np.testing.assert_allclose(float(model.alpha), self.alpha, rtol=within)


def logs(last):
    """Logarithms of responsibilities (4, K), the last row as given."""
    return np.log([[0.2] * K] * 3 + [last])


def model(kind="diag", seed=0, steps=1, k=K, x=None, **given):
    torch.manual_seed(seed)
    found = DPMM(k, D, **({"update_rate": 0.2, "cov_type": kind} | given))
    found.initialize(rows() if x is None else x)
    for t in range(steps):
        found.step(rows(seed=t + 1))
    return found
