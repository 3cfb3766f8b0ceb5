"""Miniatures of the BMAD sets in every layout in circulation, shared by the tests of loader and protocol."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from textures import RGB, save, spoiled, weave

BONE = np.array([(0, 0, 0), (56, 56, 78), (112, 123, 143), (255, 255, 255)], np.uint8)
"""matplotlib's "bone" at labels 0, 1, 2 and 4 of 4, as BMAD's script writes BraTS2021's masks."""

LAYOUTS = {  # name -> root below the folder given, where images and masks of split and class lie
    "brain-L1": ("BraTS2021_slice", "{split}/{kind}/img", "{split}/{kind}/label"),
    "liver-L1": ("hist_DIY", "{split}/img/{kind}", "{split}/label/{kind}"),
    "resc-L1": ("RESC", "{Split}/{split}/{kind}", "{Split}/{split}_label/{kind}"),
    "brain-L2": ("Brain_AD/BraTS2021_slice", "{split}/{kind}/img", "{split}/{kind}/label"),
    "liver-L2": ("Liver_AD/hist_DIY", "{split}/{kind}/img", "{split}/{kind}/label"),
    "liver-X2": ("Liver/Train/hist_DIY", "{split}/img/{kind}", "{split}/label/{kind}"),
    "resc-L2": ("Retina_RESC_AD/RESC", "{split}/{kind}/img", "{split}/{kind}/label"),
    "brain-L3": ("Brain", "{split}/{kind}/img", "{split}/{kind}/anomaly_mask"),
    "resc-AR": ("resc", "{split}/img/{kind}", "{split}/label/{kind}"),
}
VALID = {"resc-L1": "val", "resc-L2": "val"}
UNGOOD = {"liver-L2": "ungood", "resc-L2": "ungood"}
SIZES = {"brain": (60, 60), "liver": (64, 64), "resc": (48, 96)}
NUMBERS = {"train": (3, 0), "valid": (3, 2), "test": (2, 3)}


def picture(seed: int, name: str, anomalous: bool) -> tuple[RGB, np.ndarray]:
    """Give an image (RGBA for the brain, gray for the others) and its label map (H, W), 0 or 1, 2, 4."""
    height, width = SIZES[name]
    box = (slice(height // 3, height - seed % 3), slice(width // 2, width - seed % 3))
    image = spoiled(seed, (height, width), box) if anomalous else weave(seed, (height, width))
    levels = np.zeros((height, width), np.uint8)
    if anomalous:
        levels[box] = 1
        levels[height // 2 : height - seed % 3, width * 5 // 8 : width - seed % 3] = 2
        levels[height * 2 // 3 : height - seed % 3, width * 3 // 4 : width - seed % 3] = 4
    if name == "brain":
        image = np.dstack([image, np.full((height, width), 255, np.uint8)])
    return image, levels


def mask_image(levels: np.ndarray, name: str) -> np.ndarray:
    """Give the mask as the set's files hold it: bone-colored RGBA for the brain, 0 and 255 for the others."""
    if name != "brain":
        return ((levels > 0) * 255).astype(np.uint8)
    colors = BONE[np.minimum(levels, 3)]
    return np.dstack([colors, np.full(levels.shape, 255, np.uint8)])


def bmad_tree(top: Path, layout: str = "brain-L1", good_masks: bool = True) -> Path:
    """Write a miniature; gives the folder that holds the splits."""
    name = layout.split("-")[0]
    below, images, masks = LAYOUTS[layout]
    root, seed = top / below, 0
    for split, numbers in NUMBERS.items():
        folder = VALID.get(layout, "valid") if split == "valid" else split
        for kind, count in zip(("good", UNGOOD.get(layout, "Ungood")), numbers, strict=True):
            words = {"split": folder, "Split": folder.capitalize(), "kind": kind}
            for i in range(count):
                seed += 1
                image, levels = picture(seed, name, kind != "good")
                file = f"{seed:05d}_{60 + i}.png"
                place = images.format(**words)
                if split == "train" and layout != "brain-L3":
                    place = f"{words['Split']}/{folder}/good" if layout == "resc-L1" else f"{folder}/good"
                save(root / place / file, image)
                if split != "train" and (kind != "good" or good_masks):
                    save(root / masks.format(**words) / file, mask_image(levels, name))
    return root


def read(path: Path) -> np.ndarray:
    """Give the stored pixels."""
    with Image.open(path) as image:
        return np.asarray(image)
