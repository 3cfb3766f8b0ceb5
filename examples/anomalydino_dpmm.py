"""A step and a score of anomalydino-dpmm and of dinofast.drop_in: results, largest difference, both times.

    python examples/anomalydino_dpmm.py
    python examples/anomalydino_dpmm.py --rows 12288 --components 500

The host cannot be installed beside today's packages, so the published equations stand in for it, as a plain
torch step with dense K × D × D statistics. That is kinder than the host, which also forms N × D × D outer
products. Both sides start every step from the same state; times are the shortest of three.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dinofast.drop_in.anomalydino_dpmm import DPMM

EPS, REG, RATE = torch.finfo(torch.float32).eps, 1e-6, 0.2


def dense_step(state: dict[str, Any], alpha: Tensor, x: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Make one step of the published equations for diagonal covariances; gives the next state and α."""
    n, d = x.shape
    v, mean, variance = state["v"], state["mean"], state["cov"].diagonal(dim1=1, dim2=2)
    rest = torch.log1p(-v[:-1]).cumsum(0)
    log_pi = v.log() + torch.cat([rest.new_zeros(1), rest])
    log_pi = torch.where(log_pi.exp() > 0, log_pi, -math.inf)
    form = torch.stack([((x - m).square() / s).sum(1) for m, s in zip(mean, variance, strict=True)], 1)
    joint = log_pi - 0.5 * (form + variance.log().sum(1) + d * math.log(2 * math.pi))
    r = joint.softmax(1)
    p = (1 - RATE) * state["resp_stat"] + RATE * r.mean(0)
    m = (1 - RATE) * state["mean_stat"] + RATE * (r.T @ x) / n
    outer = torch.stack([(x * share[:, None]).T @ x for share in r.T]) / n
    c = (1 - RATE) * state["cov_stat"] + RATE * outer
    mu = m / (p + EPS)[:, None]
    spread = c.diagonal(dim1=1, dim2=2) / (p + EPS)[:, None] - mu.square() + REG
    tail = p.flip(0).cumsum(0).flip(0) - p
    after = p / (p + (alpha - 1) / n + tail + EPS)
    ends = torch.digamma(n * (p + tail) + alpha + 1) - torch.digamma(n * tail + alpha)
    found = {
        "resp_stat": p,
        "mean_stat": m,
        "cov_stat": c,
        "v": after,
        "mean": mu,
        "cov": spread.diag_embed(),
    }
    return {"iterations": state["iterations"] + 1, **found}, (len(p) - 1) / ends[:-1].sum()


def dense_score(state: dict[str, Any], x: Tensor) -> Tensor:
    """Give 1 − the largest cosine to a mean among the components of weight above 1e-6."""
    rest = torch.log1p(-state["v"][:-1]).cumsum(0)
    pi = (state["v"].log() + torch.cat([rest.new_zeros(1), rest])).softmax(0)
    means = state["mean"][pi > 1e-6]
    return 1 - (torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(means).T).amax(1)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Give what a call gives, and its seconds."""
    start = time.perf_counter()
    found = call()
    return found, time.perf_counter() - start


def main(rows: int = 2048, components: int = 100, channels: int = 384, steps: int = 3) -> dict[str, float]:
    """Compare some steps and a score; gives the largest difference of each comparison."""
    torch.manual_seed(0)
    centers = torch.randn(2 * components, channels)
    batches = []
    for _ in range(steps + 1):
        owner = torch.randint(len(centers), (rows,))
        x = centers[owner] + 0.5 * torch.randn(rows, channels)
        batches.append(torch.nn.functional.normalize(x))
    model = DPMM(components, channels, update_rate=RATE, cov_type="diag", reg_covar=REG)
    model.initialize(batches[0])
    differences, seconds = (
        {"step": 0.0, "score": 0.0},
        {name: [math.inf, math.inf] for name in ("step", "score")},
    )
    for batch in batches[:-1]:
        state, alpha = model.state_dict(), model.alpha
        (theirs, their_alpha), host = timed(lambda s=state, a=alpha, x=batch: dense_step(s, a, x))
        _, ours = timed(lambda x=batch: model.step(x))
        seconds["step"] = [min(pair) for pair in zip(seconds["step"], (host, ours), strict=True)]
        mine = model.state_dict()
        gaps = [
            float((theirs[key] - mine[key]).abs().max())
            for key in theirs
            if key not in ("iterations", "cov_stat")
        ]
        diagonals = (s["cov_stat"].diagonal(dim1=1, dim2=2) for s in (theirs, mine))
        gaps += [
            float((next(diagonals) - next(diagonals)).abs().max()),
            float((their_alpha / model.alpha - 1).abs()),
        ]
        differences["step"] = max(differences["step"], *gaps)
    state = model.state_dict()
    for _ in range(3):
        theirs, host = timed(lambda: dense_score(state, batches[-1]))
        mine, ours = timed(lambda: model.cosine_distance_to_nearest_cluster(batches[-1]))
        seconds["score"] = [min(pair) for pair in zip(seconds["score"], (host, ours), strict=True)]
    differences["score"] = float((theirs - mine).abs().max())
    print(f"{rows} rows, {components} components, {channels} channels, diagonal, after {steps} steps")
    print(f"alpha: host equations {float(their_alpha):.5f}, dinofast {float(model.alpha):.5f}")
    print(f"first scores: host equations {theirs[:3].tolist()}, dinofast {mine[:3].tolist()}")
    for name, (host, ours) in seconds.items():
        gap = differences[name]
        print(f"{name:6} largest difference {gap:.2e}, host equations {host:.4f} s, dinofast {ours:.4f} s")
    return differences


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--components", type=int, default=100)
    parser.add_argument("--channels", type=int, default=384)
    arguments = parser.parse_args()
    main(arguments.rows, arguments.components, arguments.channels)
