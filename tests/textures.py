"""Small pictures with the look of real ones, shared by the tests of the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

RGB = npt.NDArray[np.uint8]


def weave(seed: int, size: tuple[int, int] = (96, 96)) -> RGB:
    """Cloth: diagonal threads of a seeded phase, uneven light, sensor noise; (H, W, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    threads = np.sin((x + y) * 0.7 + rng.uniform(0, 6)) + np.sin((x - y) * 0.7 + rng.uniform(0, 6))
    light = Image.fromarray(rng.uniform(-1, 1, (3, 3)).astype(np.float32)).resize(size[::-1], Image.BICUBIC)
    gray = 120 + 30 * threads + 15 * np.asarray(light) + rng.normal(0, 4, size)
    return (gray[..., None] * (1.0, 0.9, 0.7)).clip(0, 255).astype(np.uint8)


def spoiled(seed: int, size: tuple[int, int] = (96, 96), box: tuple[slice, slice] | None = None) -> RGB:
    """The same cloth with a spot of something else in `box`, by default its lower right third."""
    image, rng = weave(seed, size), np.random.default_rng(seed + 1000)
    box = box or (slice(size[0] * 2 // 3, None), slice(size[1] * 2 // 3, None))
    shape = image[box].shape
    rings = np.hypot(*np.mgrid[: shape[0], : shape[1]])
    spot = 90 + 80 * np.sign(np.sin(rings * 0.35 + rng.uniform(0, 6)))
    image[box] = (spot[..., None] * (0.4, 0.8, 1.0)).clip(0, 255).astype(np.uint8)
    return image


def save(path: Path, image: RGB, **options: Any) -> Path:
    """Write a picture, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return path


def scan(path: Path, n_slices: int = 4, seed: int = 0, **bad: Any) -> Path:
    """Write a NIfTI of cloth with a tilted, anisotropic affine; `bad` puts values at [0, 0, 0], [1, 1, 1]."""
    voxels = np.stack([weave(seed + i)[..., 0].T for i in range(n_slices)], -1).astype(np.float32)
    for i, value in enumerate(bad.values()):
        voxels[i, i, i] = value
    affine = np.array([[-0.9, 0.1, 0, 40], [0.1, 0.9, 0, -40], [0, 0, 5, -10], [0, 0, 0, 1]])
    path.parent.mkdir(parents=True, exist_ok=True)
    import nibabel

    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path
