"""Support images in NumPy, and scenes for them."""

import numpy as np
import torch
from scipy import ndimage
from sklearn.decomposition import PCA
from test_kmeans import lloyd, plus_plus, unit

from dinofast.types import Features

SIZE, D, E = (50, 61), 10, 7
PCA_THRESHOLD = 1.0


def scenes(b, h=9, w=8, seed=0):
    """Tokens of two tissues on a background, gray that shows them, and class tokens of their own."""
    rng = np.random.default_rng(seed)
    kinds = 2 * np.random.default_rng(99).normal(size=(4, D))
    kinds[:2, 0] += 3
    y, x = np.mgrid[:h, :w]
    inside = ((y - h / 2) / (0.4 * h)) ** 2 + ((x - w / 2) / (0.4 * w)) ** 2 < 1
    kind = np.where(inside, rng.integers(2, size=(b, h, w)), rng.integers(2, 4, size=(b, h, w)))
    tokens = kinds[kind] + rng.normal(size=(b, 1, 1, D)) + 0.4 * rng.normal(size=(b, h, w, D))
    gray = np.where(inside, rng.uniform(0.1, 0.9, size=(b, h, w)), rng.uniform(0, 0.03, size=(b, h, w)))
    return tokens.astype(np.float32), rng.normal(size=(b, E)).astype(np.float32), gray.astype(np.float32)


def features(tokens, cls, gray, size=SIZE):
    tensors = [None if x is None else torch.from_numpy(np.ascontiguousarray(x)) for x in (tokens, cls, gray)]
    return Features(tensors[0], tensors[1], size, intensity=tensors[2])


def otsu(values):
    """Try every value as the threshold."""
    best, found = 0, None
    for t in np.unique(values)[:-1]:
        low, high = values[values <= t], values[values > t]
        between = len(low) * len(high) * (high.mean() - low.mean()) ** 2
        if between > best:
            best, found = between, t
    return np.zeros(values.shape, bool) if found is None else values > found


def true_foreground(rule, tokens, gray, threshold=0.02):
    """One image."""
    h, w, d = tokens.shape
    if rule == "intensity":
        return gray > threshold
    if rule == "otsu":
        return otsu(gray.astype(float))
    if rule == "none":
        return np.ones((h, w), bool)
    t = PCA(n_components=1, svd_solver="full").fit_transform(tokens.reshape(-1, d).astype(float))
    t = t.reshape(h, w)
    mask = t > PCA_THRESHOLD
    window = mask[int(h * 0.2) : int(h * 0.8), int(w * 0.2) : int(w * 0.8)]
    mask = -t > PCA_THRESHOLD if window.sum() <= 0.35 * window.size else mask
    box = np.ones((3, 3), bool)
    image = ndimage.binary_dilation(mask, box)
    return ndimage.binary_erosion(ndimage.binary_dilation(image, box), box, border_value=1)


class Truth:
    """The whole method, image by image, with the model's own arguments."""

    def __init__(self, model, tokens, cls, gray):
        self.p = model.params()
        reported = self.p["compat"] == "reported"
        self.aggregate = self.p["aggregate"] or ("mean" if reported else "max")
        self.normalize = self.p["normalize"] or ("image" if reported else "none")
        self.pool, self.prototypes, ends = [], [], []
        for image in zip(tokens, cls, gray, strict=True):
            mask, vector = self.describe(*image)
            rows = unit(image[0].astype(float))[mask]
            found = rows
            if len(rows) > self.p["n_clusters"]:
                generator = torch.Generator().manual_seed(self.p["seed"])
                start = plus_plus(rows, self.p["n_clusters"], generator)
                found = lloyd(rows, start, cosine=self.p["distance"] == "cosine")[0]
            self.pool.append(vector)
            self.prototypes.append(unit(found))
            u = self.similarity(rows, self.prototypes[-1])
            ends.append((u.min(), u.max()))
        self.ends = np.min(ends), np.max(ends)

    def describe(self, tokens, cls, gray):
        mask = true_foreground(self.p["foreground"], tokens, gray, self.p["intensity_threshold"])
        rows = unit(tokens.astype(float))
        kinds = {"cls": cls.astype(float), "mean_patch": rows.mean((0, 1))}
        kinds["mean_foreground_patch"] = rows[mask].mean(0) if mask.any() else kinds["mean_patch"]
        return mask, unit(kinds[self.p["match_descriptor"]])

    def similarity(self, rows, prototypes):
        u = rows @ prototypes.T
        return u.max(-1) if self.aggregate == "max" else u.mean(-1)

    def patches(self, tokens, cls, gray):
        mask, vector = self.describe(tokens, cls, gray)
        near = np.argsort(-np.stack(self.pool) @ vector, kind="stable")[: self.p["n_support"]]
        u = self.similarity(unit(tokens.astype(float)), np.concatenate([self.prototypes[j] for j in near]))
        low, high = {"none": (0, 1), "dataset": self.ends}.get(self.normalize, (None, None))
        if self.normalize == "image":
            seen = u[mask] if mask.any() else u
            low, high = seen.min(), seen.max()
        scores = 1 - (u - low) / (high - low)
        if self.p["mask_query_background"] is not False and self.p["foreground"] != "none":
            scores[~mask] = 0 if self.normalize == "image" else 1 - (1 - low) / (high - low)
        return near, scores
