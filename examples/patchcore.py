"""patchcore-inspection: greedy coreset, faiss index, mean of squared distances; its names from dinofast."""

from __future__ import annotations

import numpy as np
import torch
from side_by_side import compare, need

need("pip install faiss-cpu", "faiss")

import faiss  # noqa: E402

from dinofast.drop_in import patchcore  # noqa: E402

draw = np.random.default_rng(0)
layers = [draw.standard_normal((3000, 128), dtype=np.float32) for _ in range(2)]
queries = [draw.standard_normal((784, 128), dtype=np.float32) for _ in range(2)]
SHARE, NEIGHBORS = 0.1, 5


def coreset(rows: np.ndarray) -> np.ndarray:
    """Select greedily, as the host does: from the matrix of all distances, starting at its longest row."""
    x = torch.from_numpy(rows)
    distances = torch.cdist(x, x)
    nearest, selected = distances.norm(dim=1), []
    for _ in range(int(SHARE * len(x))):
        farthest = int(nearest.argmax())
        selected.append(farthest)
        nearest = torch.minimum(nearest, distances[farthest])
    return rows[selected]


def host() -> tuple[np.ndarray, ...]:
    """Fit and score with faiss."""
    bank = coreset(np.concatenate(layers, axis=1))
    index = faiss.IndexFlatL2(bank.shape[1])
    index.add(bank)
    distances, _ = index.search(np.concatenate(queries, axis=1), NEIGHBORS)
    return bank, distances.mean(axis=-1)


def ours() -> tuple[np.ndarray, ...]:
    """Fit and score with the host's names."""
    sampler = patchcore.GreedyCoresetSampler(SHARE, "cpu", dimension_to_project_features_to=None)
    bank = sampler.run(np.concatenate(layers, axis=1))
    scorer = patchcore.NearestNeighbourScorer(NEIGHBORS)
    scorer.fit([bank])
    return bank, scorer.predict(queries)[0]


compare("coreset of 300 from 3000 rows in 256 channels, 784 patch scores, k = 5", host, ours)
