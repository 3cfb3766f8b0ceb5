"""Dice, per-region overlap and the paired test, each against its definition written out."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch

from dinofast.errors import InputError
from dinofast.metrics import PooledDice, RegionOverlap, paired_permutation


def images(seed, n=6, size=(17, 23), step=0.0):
    """Maps and masks, the first without a region; `step` rounds the scores so that they tie."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        truth = np.zeros(size, bool)
        for _ in range(rng.integers(1, 4) if i else 0):
            y, x = rng.integers(0, size[0] - 4), rng.integers(0, size[1] - 4)
            truth[y : y + rng.integers(1, 5), x : x + rng.integers(1, 5)] = True
        if i == 2:
            truth[:4, :4] = np.eye(4, dtype=bool)
        map = rng.uniform(0, 1, size) + 0.7 * truth
        yield (np.round(map / step) * step if step else map).astype(np.float32), truth


def test_dice_counts_pixels_of_all_images_together():
    thresholds = [0.2, 0.9, 1.3, 5.0]
    pairs = list(images(0))
    dice = PooledDice(thresholds)
    for map, truth in pairs:
        dice.update(map, truth)
    dice.update(torch.empty(0), torch.empty(0))
    for i, threshold in enumerate(thresholds):
        tp = fp = fn = normal = 0
        for map, truth in pairs:
            for score, positive in zip(map.ravel().tolist(), truth.ravel().tolist(), strict=True):
                called = score > np.float32(threshold)
                tp += called and positive
                fp += called and not positive
                fn += positive and not called
                normal += not positive
        assert dice.dice()[i] == 2 * tp / (2 * tp + fp + fn)
        assert dice.false_positive_rates()[i] == fp / normal


def test_a_score_at_the_threshold_is_normal():
    dice = PooledDice([0.1])
    dice.update(np.array([0.1, 0.2], np.float32), [1, 1])
    assert dice.dice() == [2 / 3]


def test_dice_that_cannot_be():
    with pytest.raises(InputError, match="at least one"):
        PooledDice([])
    with pytest.raises(InputError, match="all finite"):
        PooledDice([float("nan")])
    with pytest.raises(InputError, match="all finite"):
        PooledDice([float("inf")])
    dice = PooledDice([0.5])
    with pytest.raises(InputError, match="no normal pixel"):
        dice.false_positive_rates()
    dice.update([0.2], [0])
    with pytest.raises(InputError, match="no abnormal pixel"):
        dice.dice()
    with pytest.raises(InputError, match="1 of 2 scores are NaN"):
        dice.update([0.2, np.nan], [0, 1])
    assert dice.false_positive_rates() == [0]


def components(truth):
    """Flood-fill the 8-connected regions; gives sets of (y, x)."""
    left, found = set(zip(*np.nonzero(truth), strict=True)), []
    while left:
        region, edge = set(), [left.pop()]
        while edge:
            y, x = edge.pop()
            region.add((y, x))
            near = {(y + dy, x + dx) for dy, dx in itertools.product((-1, 0, 1), repeat=2)} & left
            left -= near
            edge += near
        found.append(region)
    return found


def overlap_area(pairs, limit):
    """The definition, with every score as a threshold."""
    regions = [[map[p] for p in region] for map, truth in pairs for region in components(truth)]
    normal = np.concatenate([map[~truth] for map, truth in pairs])
    points = [(0.0, 0.0)]
    for t in sorted({v for map, _ in pairs for v in map.ravel().tolist()}, reverse=True):
        pro = np.mean([np.mean([score >= t for score in region]) for region in regions])
        points.append((np.mean(normal >= t), pro))
    area = 0.0
    for (f0, p0), (f1, p1) in itertools.pairwise(points):
        if f0 < limit and f1 > f0:
            f = min(f1, limit)
            p = p0 + (p1 - p0) * (f - f0) / (f1 - f0)
            area += (f - f0) * (p0 + p) / 2
    return area / limit


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_region_overlap_is_its_definition(limit):
    pairs = list(images(1, step=1 / 16))  # sixteenths below 2 have bins of their own
    regions = RegionOverlap(limit)
    for map, truth in pairs:
        regions.update(map, truth)
    assert regions.n_regions == sum(len(components(truth)) for _, truth in pairs)
    assert regions.area().value == pytest.approx(overlap_area(pairs, limit), abs=1e-12)


@pytest.mark.parametrize("bins", [2**9, 2**12, 2**20])
def test_region_overlap_bounds_contain_the_exact_area(bins):
    for seed in range(3):
        pairs = list(images(seed, n=4))
        regions = RegionOverlap(bins=bins)
        for map, truth in pairs:
            regions.update(torch.from_numpy(map), truth)
        found, exact = regions.area(), overlap_area(pairs, 0.3)
        assert 0 <= found.low <= exact <= found.high <= 1
        assert found.low <= found.value <= found.high
        if bins == 2**20:
            assert found.high - found.low < 2e-3


def test_pixels_that_touch_at_a_corner_are_one_region():
    regions = RegionOverlap()
    regions.update(np.zeros((5, 5)), np.eye(5))
    assert regions.n_regions == 1


def test_small_regions_count_as_much_as_large_ones():
    truth = np.zeros((20, 20), bool)
    truth[:10, :10] = truth[15, 15] = True
    found = RegionOverlap()
    found.update(np.where(truth, 1.0, 0.0) * (np.indices(truth.shape)[0] < 12), truth)
    assert found.area().value == pytest.approx(0.5 + 0.5 * 0.15)


def test_region_overlap_that_cannot_be(monkeypatch):
    for limit in (0.0, 1.5):
        with pytest.raises(InputError, match="limit is"):
            RegionOverlap(limit)
    with pytest.raises(InputError, match="power of two"):
        RegionOverlap(bins=1000)
    regions = RegionOverlap()
    with pytest.raises(InputError, match=r"map \(4,\) and truth \(4,\)"):
        regions.update(np.zeros(4), np.ones(4))
    with pytest.raises(InputError, match=r"map \(2, 2\) and truth \(2, 3\)"):
        regions.update(np.zeros((2, 2)), np.ones((2, 3)))
    regions.update(np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(InputError, match="0 regions and 4 normal pixels"):
        regions.area()
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    with pytest.raises(InputError, match=r"needs scipy: pip install 'dinofast\[regions\]'"):
        RegionOverlap()


def all_signs(difference, alternative):
    """The exact p-value: every pattern of signs."""
    means = [np.mean(np.multiply(s, difference)) for s in itertools.product((1, -1), repeat=len(difference))]
    observed = np.mean(difference)
    extreme = {
        "two-sided": [abs(m) >= abs(observed) - 1e-12 for m in means],
        "greater": [m >= observed - 1e-12 for m in means],
        "less": [m <= observed + 1e-12 for m in means],
    }
    return np.mean(extreme[alternative])


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
@pytest.mark.parametrize("shift", [-0.3, 0.0, 0.6])
def test_p_value_approaches_that_of_all_sign_patterns(alternative, shift):
    rng = np.random.default_rng(1)
    first, second = rng.normal(shift, 1, 9), rng.normal(0, 0.5, 9)
    exact = all_signs(first - second, alternative)
    found = paired_permutation(first, second, n_permutations=40_000, alternative=alternative)
    assert found.p_value == pytest.approx(exact, abs=4 * np.sqrt(0.25 / 40_000) + 1e-4)
    assert found.difference == pytest.approx(np.mean(first - second))
    assert (found.n_pairs, found.n_permutations, found.alternative) == (9, 40_000, alternative)


def test_the_seed_decides_and_chunks_do_not(monkeypatch):
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.1, 1, 50), rng.normal(0, 1, 50)
    whole = paired_permutation(first, second, seed=3)
    assert whole == paired_permutation(torch.from_numpy(first), list(second), seed=3)
    assert whole.p_value != paired_permutation(first, second, seed=4).p_value
    monkeypatch.setattr("dinofast.metrics.permutation._CHUNK", 777)
    assert paired_permutation(first, second, seed=3).p_value == pytest.approx(whole.p_value, abs=0.03)


def test_p_value_of_equal_and_of_far_methods():
    values = np.random.default_rng(0).uniform(size=40)
    assert paired_permutation(values, values).p_value == 1
    assert paired_permutation(values + 1, values).p_value == 1 / 10_001
    assert paired_permutation(values + 1, values, alternative="less").p_value == 1


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (([], []), {}, "0 and 0 values"),
        (([1, 2], [1]), {}, "2 and 1 values"),
        (([1, np.nan], [1, 2]), {}, "1 of 2 pairs hold NaN"),
        (([1], [2]), {"alternative": "both"}, "'both'; one of two-sided"),
        (([1], [2]), {"n_permutations": 0}, "at least 1"),
        (([1], [2]), {"n_permutations": 2.5}, "n_permutations is 2.5; give a whole number"),
    ],
)
def test_pairs_that_cannot_be_tested(args, options, message):
    with pytest.raises(InputError, match=message):
        paired_permutation(*args, **options)
