"""AnomalyDINO: a script that imports faiss inside `patch("faiss")`; then its names from dinofast."""

from __future__ import annotations

import numpy as np
from side_by_side import compare, need

need("pip install 'dinofast[bench]'", "faiss", "cv2", "scipy")

import cv2  # noqa: E402
from scipy.ndimage import gaussian_filter  # noqa: E402

from dinofast.drop_in import anomalydino, patch  # noqa: E402

GRID, SIZE = (32, 32), (448, 448)
draw = np.random.default_rng(0)
reference = draw.standard_normal((8 * 1024, 384), dtype=np.float32)
images = draw.standard_normal((12, 1024, 384), dtype=np.float32)


def script() -> list[np.ndarray]:
    """Do as the host's scripts: normalize in place, index, search, maps, means of the top 1 %."""
    import faiss

    bank = reference.copy()
    faiss.normalize_L2(bank)
    knn_index = faiss.IndexFlatL2(bank.shape[1])
    knn_index.add(bank)
    found = []
    for features in images.copy():
        faiss.normalize_L2(features)
        distances, _ = knn_index.search(features, k=1)
        patches = distances[:, 0] / 2
        pixels = cv2.resize(patches.reshape(GRID), SIZE[::-1], interpolation=cv2.INTER_LINEAR)
        top = np.sort(patches)[-int(0.01 * len(patches)) :]
        found += [patches, gaussian_filter(pixels, sigma=4.0), top.mean(keepdims=True)]
    return found


def patched() -> list[np.ndarray]:
    """Run the same script on dinofast."""
    with patch("faiss"):
        return script()


def names() -> list[np.ndarray]:
    """Call the host's names instead."""
    search, found = anomalydino.Search(reference), []
    for features in images:
        patches = search(features)
        pixels = anomalydino.dists2map(patches.reshape(GRID), SIZE)
        found += [patches, pixels, np.array([anomalydino.mean_top1p(patches)])]
    return found


work = "12 images of 1024 patches against 8: patch scores, maps, image scores"
compare(f"the script inside patch('faiss'), {work}", script, patched)
compare(f"the names of dinofast.drop_in.anomalydino, {work}", script, names)
