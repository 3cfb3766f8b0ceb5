"""Rows for scikit-learn's estimators and ours."""

import numpy as np

DTYPES = (np.float64, np.float32)


def rows(n=400, d=5, seed=0, dtype=np.float64):
    draw = np.random.default_rng(seed)
    centers = 3 * np.random.default_rng(8).normal(size=(6, d))
    spread = np.random.default_rng(9).uniform(0.3, 1, size=(6, d))
    owner = draw.integers(6, size=n)
    return (centers[owner] + spread[owner] * draw.normal(size=(n, d))).astype(dtype)
