"""Scores of a set without normal images against brute force."""

import numpy as np
import pytest
from bank_truth import SIZE, clustered, features, scene, true_image_scores, true_map, true_mask, unit

from dinofast.errors import InputError
from dinofast.models.memory_bank import MemoryBank


def mean_below(distance, rank):
    """Mean of what lies strictly below the value of a rank, counted from 1; that value where nothing does."""
    limit = np.sort(distance)[rank - 1]
    return distance[distance < limit].mean() if (distance < limit).any() else limit


def true_set_scores(tokens):
    """Zero-shot scores by brute force: sort all distances, average those strictly below the rank's."""
    rows = [unit(t.reshape(-1, t.shape[-1]).astype(float)) for t in tokens]
    patches = []
    for image, own in enumerate(rows):
        others = np.concatenate([r for i, r in enumerate(rows) if i != image])
        distance = 1 - own @ others.T
        patches.append([mean_below(row, len(others) // 1000) for row in distance])
    return np.array(patches).reshape(tokens.shape[:3])


@pytest.mark.parametrize(("b", "side"), [(11, 10), (5, 23), (20, 8), (31, 10)])
@pytest.mark.parametrize("compat", ["anomalydino", "anomalib"])
def test_score_set_equals_brute_force(b, side, compat):
    tokens = clustered(b, side, side, seed=3)
    model = MemoryBank(compat=compat)
    found = model.score_set(features(part) for part in np.array_split(tokens, 3))
    patches = true_set_scores(tokens)
    np.testing.assert_allclose(found.score, true_image_scores(patches), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.map, true_map(patches, SIZE, compat), rtol=1e-4, atol=1e-6)
    assert not model.is_fitted


def test_score_set_leaves_the_fitted_bank():
    model = MemoryBank().fit([features(clustered(1, 4, 4))])
    before = model.bank
    model.score_set([features(clustered(11, 10, 10))])
    assert model.bank is before


def test_score_set_of_identical_images_is_zero_not_nan():
    tokens = np.repeat(clustered(1, 10, 10), 12, axis=0)
    found = MemoryBank().score_set([features(tokens)])
    assert found.score.abs().max() < 1e-6
    assert found.map.abs().max() < 1e-6


@pytest.mark.parametrize("mask_references", [False, True])
def test_score_set_with_masks(mask_references):
    tokens = np.stack([scene(16, 16, seed=s) for s in range(20)])
    model = MemoryBank(masking=True, mask_threshold=4.0, mask_references=mask_references)
    mask = np.stack([true_mask(t, 4.0, "1d") for t in tokens])
    rows = [unit(t.reshape(-1, 20).astype(float)) for t in tokens]
    patches = np.zeros(mask.shape)
    for image, own in enumerate(rows):
        others = [r[mask[i].ravel()] if mask_references else r for i, r in enumerate(rows) if i != image]
        distance = 1 - own[mask[image].ravel()] @ np.concatenate(others).T
        patches[image][mask[image]] = [mean_below(row, distance.shape[1] // 1000) for row in distance]
    found = model.score_set([features(tokens)])
    np.testing.assert_allclose(found.score, true_image_scores(patches), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("params", "batches", "message"),
    [
        ({}, lambda: [clustered(10, 10, 10)], "have 900 patches, fewer than the 1000"),
        ({}, lambda: [clustered(1, 40, 40)], "have 0 patches"),
        (
            {"masking": True, "mask_threshold": 1e6, "mask_references": True},
            lambda: [clustered(12, 10, 10)],
            "0",
        ),
        ({}, lambda: [clustered(6, 10, 10), clustered(6, 10, 11)], r"\(10, 10\) at .* and \(10, 11\) at"),
        ({}, list, "no images"),
        ({"metric": "euclidean"}, lambda: [clustered(12, 10, 10)], "defined for the cosine metric"),
    ],
)
def test_score_set_refuses(params, batches, message):
    with pytest.raises(InputError, match=message):
        MemoryBank(**params).score_set(features(tokens) for tokens in batches())
