"""Independent derivations of the memory bank's scores, maps and foreground in NumPy."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from sklearn.decomposition import PCA

from dinofast.types import Features

SIZE = (90, 71)


def clustered(b, h, w, d=24, seed=0):
    """Patches around six centers, drawn in float32."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(6, d))
    return (centers[rng.integers(6, size=(b, h, w))] + 0.3 * rng.normal(size=(b, h, w, d))).astype(np.float32)


def features(tokens, size=SIZE):
    return Features(torch.from_numpy(np.ascontiguousarray(tokens)), None, size)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def true_patch_scores(tokens, bank, k, metric):
    q, m = tokens.reshape(-1, tokens.shape[-1]).astype(float), bank.reshape(-1, bank.shape[-1]).astype(float)
    if metric == "cosine":
        q, m = unit(q), unit(m)
    sq = np.sort(((q[:, None] - m[None]) ** 2).sum(2), axis=1)[:, :k].mean(1)
    return (sq / 2 if metric == "cosine" else np.sqrt(sq)).reshape(tokens.shape[:-1])


def true_image_scores(patches):
    scores = []
    for flat in patches.reshape(len(patches), -1):
        t = int(0.01 * flat.size)
        scores.append(np.sort(flat)[-t:].mean() if t else flat.max())
    return np.array(scores)


def true_map(patches, size, compat):
    patches = torch.from_numpy(patches)[:, None]
    if compat == "anomalydino":
        up = F.interpolate(patches, size, mode="bilinear", align_corners=False)[:, 0].numpy()
        return np.stack([ndimage.gaussian_filter(m, sigma=4, truncate=4, mode="reflect") for m in up])
    up = F.pad(F.interpolate(patches, size, mode="nearest"), (16, 16, 16, 16), mode="reflect")
    kernel = torch.exp(-0.5 * (torch.arange(-16, 17, dtype=torch.float64) / 4) ** 2)
    kernel = torch.outer(kernel, kernel)
    return F.conv2d(up, (kernel / kernel.sum())[None, None])[:, 0].numpy()


def true_mask(tokens, threshold, morphology):
    """One image (h, w, D), by scikit-learn and SciPy."""
    h, w, d = tokens.shape
    rows = tokens.reshape(-1, d).astype(float)
    t = PCA(n_components=1, svd_solver="full").fit_transform(rows).reshape(h, w)
    mask = t > threshold
    window = mask[int(h * 0.2) : int(h * 0.8), int(w * 0.2) : int(w * 0.8)]
    if window.sum() <= window.size * 0.35:
        mask = -t > threshold
    image = mask.reshape(-1, 1) if morphology == "1d" else mask
    box = np.ones((3, 3), bool)
    image = ndimage.binary_dilation(image, box)
    image = ndimage.binary_erosion(ndimage.binary_dilation(image, box), box, border_value=1)
    return image.reshape(h, w)


def scene(h, w, seed=0, d=20, noise=0.3):
    """One image with an object, at a distance along a random direction, in the middle or around it."""
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=d)
    y, x = np.mgrid[:h, :w]
    inside = ((y - h / 2) / (0.37 * h)) ** 2 + ((x - w / 2) / (0.3 * w)) ** 2 < 1
    inside ^= rng.random((h, w)) < 0.08
    place = np.where(inside ^ bool(seed % 2), 3.0, 0.0) + noise * rng.normal(size=(h, w))
    return (5 + place[..., None] * axis + 0.2 * rng.normal(size=(h, w, d))).astype(np.float32)
