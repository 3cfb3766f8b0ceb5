"""fastkmeans: change the import, keep the calls; both start from the rows that the seed draws."""

from __future__ import annotations

from typing import Any

import numpy as np
from side_by_side import compare, need

need("pip install fastkmeans", "fastkmeans")

import fastkmeans  # noqa: E402

from dinofast.drop_in import fastkmeans as dinofast_fastkmeans  # noqa: E402

K, CHANNELS = 64, 384
draw = np.random.default_rng(0)
directions = 4 * draw.standard_normal((K, CHANNELS), dtype=np.float32)
rows = directions[draw.integers(K, size=20_000)] + draw.standard_normal((20_000, CHANNELS), dtype=np.float32)


def clustered(library: Any) -> list[Any]:
    """Give the centroids after five iterations, and the cluster of every row."""
    kmeans = library.FastKMeans(CHANNELS, K, niter=5, gpu=False, device="cpu", seed=1)
    kmeans.train(rows)
    return [kmeans.centroids, kmeans.predict(rows)]


compare(
    f"FastKMeans: {K} clusters of 20 000 rows of {CHANNELS} channels, five iterations",
    lambda: clustered(fastkmeans),
    lambda: clustered(dinofast_fastkmeans),
)
