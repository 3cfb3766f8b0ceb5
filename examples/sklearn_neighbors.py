"""scikit-learn and dinofast.drop_in.sklearn on the same patches: results, largest difference, both times.

    python examples/sklearn_neighbors.py
    python examples/sklearn_neighbors.py --rows 50000 --queries 2048

Patches are drawn: unit rows around a few directions, of the length of DINO's smallest tokens. Every pair of
calls is made three times in turn, and the shortest times are shown.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn import cluster, mixture, neighbors

from dinofast.drop_in import sklearn as ours


def patches(n: int, d: int, seed: int) -> Any:
    """Draw unit rows (n, d), float32, around 40 directions."""
    draw, centers = np.random.default_rng(seed), np.random.default_rng(99).normal(size=(40, d))
    rows = centers[draw.integers(40, size=n)] + draw.normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def compare(name: str, host: Callable[[], Any], drop_in: Callable[[], Any], repeats: int = 3) -> float:
    """Make both calls in turn, print what they give and take, and return the largest difference."""
    shortest, results = [np.inf, np.inf], [None, None]
    for _ in range(repeats):
        for which, call in enumerate((host, drop_in)):
            start = time.perf_counter()
            results[which] = call()
            shortest[which] = min(shortest[which], time.perf_counter() - start)
    theirs, mine = (np.asarray(result, np.float64) for result in results)
    difference = float(np.abs(theirs - mine).max())
    shown = [np.array2string(r.ravel()[:3], precision=5, separator=" ") for r in (theirs, mine)]
    print(name)
    print(f"  host     {shortest[0]:.3f} s  {shown[0]}")
    print(f"  dinofast {shortest[1]:.3f} s  {shown[1]}")
    print(f"  largest difference {difference:.2e}")
    return difference


def main(rows: int = 20000, queries: int = 1024, channels: int = 384, repeats: int = 3) -> dict[str, float]:
    """Compare the three estimators; gives the largest difference of each comparison."""
    warnings.simplefilter("ignore")  # mixtures that are stopped early
    bank, asked = patches(rows, channels, 0), patches(queries, channels, 1)
    print(f"{rows} rows, {queries} queries, {channels} channels, float32")
    found = {}
    for metric in ("cosine", "euclidean"):
        host = neighbors.NearestNeighbors(n_neighbors=5, metric=metric, algorithm="brute").fit(bank)
        mine = ours.NearestNeighbors(n_neighbors=5, metric=metric).fit(bank)
        found[metric] = compare(
            f"5 neighbors, {metric}",
            lambda host=host: host.kneighbors(asked)[0],
            lambda mine=mine: mine.kneighbors(asked)[0],
            repeats,
        )
    k = min(64, queries)
    clusters = {"n_clusters": k, "init": bank[:k], "n_init": 1, "max_iter": 10, "tol": 0.0}
    found["k-means"] = compare(
        f"k-means, {k} clusters",
        lambda: cluster.KMeans(**clusters).fit(bank).cluster_centers_,
        lambda: ours.KMeans(**clusters).fit(bank).cluster_centers_,
        repeats,
    )
    components = {
        "n_components": min(16, queries),
        "covariance_type": "diag",
        "init_params": "random",
        "random_state": 0,
        "max_iter": 5,
        "tol": 0.0,
    }
    found["mixture"] = compare(
        "mixture, five iterations",
        lambda: mixture.BayesianGaussianMixture(**components).fit(bank).means_,
        lambda: ours.BayesianGaussianMixture(**components).fit(bank).means_,
        repeats,
    )
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--channels", type=int, default=384)
    arguments = parser.parse_args()
    main(arguments.rows, arguments.queries, arguments.channels)
