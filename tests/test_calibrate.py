from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from dinofast.calibrate import PixelCalibrator, Threshold, image_threshold, wilson
from dinofast.errors import ArtifactError, InputError


def calibrated(maps, fpr=0.05, **options):
    calibrator = PixelCalibrator(fpr, **options)
    for one in maps:
        calibrator.update(one)
    return calibrator.threshold()


def normal_maps(n, seed=0, size=(40, 30)):
    rng = np.random.default_rng(seed)
    return [np.abs(rng.normal(rng.uniform(0.2, 1), 0.3, size)).astype(np.float32) for _ in range(n)]


def test_image_threshold_is_the_conformal_order_statistic():
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 100.0))
    threshold = image_threshold(torch.from_numpy(scores), 0.05)
    assert threshold.value == 95
    assert threshold.realized_rate == 4 / 99
    assert (threshold.n_images, threshold.n_pixels, threshold.level) == (99, None, "image")


@pytest.mark.parametrize(
    ("fpr", "needed"), [(0.05, 19), (0.1, 9), (0.3, 3), (0.01, 99), (0.001, 999), (0.5, 1)]
)
def test_image_threshold_names_the_number_of_images_needed(fpr, needed):
    assert image_threshold(np.arange(needed), fpr).value == needed - 1
    with pytest.raises(InputError, match=f"{needed - 1} normal images .* it takes {needed}; give more"):
        image_threshold(np.arange(needed - 1), fpr)


def test_new_normal_images_exceed_at_most_as_often_as_asked():
    rng = np.random.default_rng(0)
    fpr, alarms, trials = 0.1, 0, 4000
    for _ in range(trials):
        scores = rng.exponential(size=25)
        alarms += scores[-1] > image_threshold(scores[:-1], fpr).value
    # P = 1 - ceil(25 · 0.9) / 25 = 0.08; four standard deviations are 0.017
    assert alarms / trials == pytest.approx(0.08, abs=0.017)


def test_ties_never_raise_the_realized_rate():
    assert image_threshold(np.ones(30), 0.05).realized_rate == 0
    scores = np.repeat([0.0, 1.0], [20, 20])
    threshold = image_threshold(scores, 0.6)
    assert (threshold.value, threshold.realized_rate) == (0, 0.5)


def test_wilson_interval_equals_scipy():
    for count, n in [(0, 1), (0, 19), (4, 99), (19, 19), (500, 10_000)]:
        expected = binomtest(count, n).proportion_ci(0.95, method="wilson")
        assert wilson(count, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("fpr", [0, 1, -0.1, 1.5, float("nan")])
def test_rate_must_lie_between_zero_and_one(fpr):
    with pytest.raises(InputError, match="above 0 and below 1"):
        image_threshold(np.arange(100), fpr)
    with pytest.raises(InputError, match="above 0 and below 1"):
        PixelCalibrator(fpr)


def test_infinite_scores_count_but_an_infinite_threshold_is_refused():
    scores = np.append(np.arange(98.0), np.inf)
    assert image_threshold(scores, 0.05).value == 94
    with pytest.raises(InputError, match="would be inf"):
        image_threshold(scores, 0.01)
    one = np.append(np.arange(99, dtype=np.float32), np.inf)
    for budget in (100, 10):
        assert calibrated([one], 0.01, budget=budget).realized_rate == 0.01
        with pytest.raises(InputError, match="would be inf"):
            calibrated([one], 0.001, budget=budget)


def test_nan_is_refused_with_its_count_and_source():
    with pytest.raises(InputError, match="scores: 2 of 3 values are NaN"):
        image_threshold([np.nan, 1, np.nan], 0.05)
    calibrator = PixelCalibrator(0.05)
    with pytest.raises(InputError, match=r"scan\.png: 1 of 4 values are NaN"):
        calibrator.update(torch.tensor([[1.0, 2.0], [float("nan"), 3.0]]), "scan.png")
    with pytest.raises(InputError, match="map: the map is empty"):
        calibrator.update(np.zeros((0, 5)))
    with pytest.raises(InputError, match="no normal map"):
        calibrator.threshold()


@pytest.mark.parametrize("fpr", [0.001, 0.05, 0.07, 0.29, 0.5])
def test_pixel_threshold_is_the_smallest_value_with_few_enough_above(fpr):
    maps = normal_maps(5, size=(20, 20))
    pixels = np.sort(np.concatenate([m.ravel() for m in maps]))
    threshold = calibrated(maps, fpr)
    assert threshold.realized_rate == np.mean(pixels > threshold.value) == pytest.approx(fpr, abs=1 / 2000)
    assert threshold.realized_rate <= fpr
    below = pixels[pixels < np.float32(threshold.value)][-1]
    assert np.mean(pixels > below) > fpr
    assert (threshold.n_images, threshold.n_pixels, threshold.level) == (5, 2000, "pixel")


@pytest.mark.parametrize("budget", [0, 10**6])
def test_one_calibrator_serves_several_rates(budget):
    maps = normal_maps(5, size=(20, 20))
    calibrator = PixelCalibrator(0.1, budget=budget)
    for map in maps:
        calibrator.update(map)
    for fpr in (0.01, 0.3, 0.1):
        assert calibrator.threshold(fpr=fpr) == calibrated(maps, fpr, budget=budget)
    assert calibrator.threshold() == calibrated(maps, 0.1, budget=budget)
    with pytest.raises(InputError, match="fpr is 1"):
        calibrator.threshold(fpr=1)


def test_rate_is_the_decimal_it_prints_as():
    pixels = np.arange(100, dtype=np.float32)
    assert calibrated([pixels], 0.29).realized_rate == 0.29


@pytest.mark.parametrize("budget", [0, 3000, 10**6])
def test_histogram_takes_over_beyond_the_budget(budget):
    maps = normal_maps(12)
    exact, threshold = calibrated(maps), calibrated(maps, budget=budget)
    pixels = np.concatenate([m.ravel() for m in maps])
    assert exact.value <= threshold.value <= exact.value * (1 + 2**-11)
    assert threshold.realized_rate == np.mean(pixels > np.float32(threshold.value))
    assert threshold.interval == pytest.approx(exact.interval, abs=1e-3)
    assert (threshold == exact) is (budget == 10**6)


@pytest.mark.parametrize("budget", [0, 10**6])
@pytest.mark.parametrize("value", [0.0, 0.3, -2.5])
def test_constant_maps_raise_no_alarm(budget, value):
    threshold = calibrated([np.full((9, 9), value)] * 3, budget=budget)
    assert threshold.value == pytest.approx(value, rel=2**-11, abs=1e-40)
    assert threshold.value >= np.float32(value)
    assert (threshold.realized_rate, threshold.interval) == (0, (0, 0))


def test_interval_is_over_images_not_pixels():
    rng = np.random.default_rng(0)
    # one image of twenty holds all the high pixels: pixels alone would give a narrow interval
    maps = [rng.random((50, 50), dtype=np.float32) for _ in range(20)]
    maps[3] += 1
    threshold = calibrated(maps)
    assert threshold.realized_rate == pytest.approx(0.05, abs=1e-4)
    low, high = threshold.interval
    assert low == 0
    assert high > 0.09


def test_interval_covers_the_true_rate():
    rng = np.random.default_rng(0)
    covered, trials = 0, 60
    for _ in range(trials):
        shifts = rng.normal(size=40)
        threshold = calibrated([rng.normal(shift, 1, 50).astype(np.float32) for shift in shifts], 0.2)
        # pixels are N(0, 2) over all images, so P(pixel > t) = erfc(t / 2) / 2
        true_rate = float(torch.erfc(torch.tensor(threshold.value / 2))) / 2
        covered += threshold.interval[0] <= true_rate <= threshold.interval[1]
    assert covered / trials > 0.85


def test_one_image_has_no_interval():
    threshold = calibrated(normal_maps(1))
    assert threshold.interval is None
    assert "interval unknown" in str(threshold)


def test_seed_decides_the_interval():
    maps = normal_maps(8)
    assert calibrated(maps) == calibrated(maps)
    assert calibrated(maps).interval != calibrated(maps, seed=1).interval


def test_threshold_survives_json():
    for threshold in (
        calibrated(normal_maps(3)),
        calibrated(normal_maps(1)),
        image_threshold(np.arange(40), 0.1),
    ):
        text = json.dumps(threshold.to_dict(), allow_nan=False)
        assert Threshold.from_dict(json.loads(text)) == threshold
        with pytest.raises(dataclasses.FrozenInstanceError):
            threshold.value = 1


@pytest.mark.parametrize(
    "change",
    [
        {"level": "voxel"},
        {"value": float("inf")},
        {"value": "0.5"},
        {"value": None},
        {"more": 1},
    ],
)
def test_foreign_threshold_is_refused(change):
    data = image_threshold(np.arange(40), 0.1, method="cross-fit 5").to_dict()
    with pytest.raises(ArtifactError, match="calibrate again"):
        Threshold.from_dict({**data, **change})
    del data["fpr"]
    with pytest.raises(ArtifactError, match="fields"):
        Threshold.from_dict(data)
