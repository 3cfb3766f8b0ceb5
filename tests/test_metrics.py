from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from dinofast.errors import InputError
from dinofast.metrics import StreamedRanking, aupr, auroc, average_precision
from dinofast.metrics.ranking import exact_dot
from dinofast.metrics.streamed import bin_edge, bin_index

METRICS = {"auroc": auroc, "aupr": aupr, "average_precision": average_precision}


def sklearn_value(name, scores, labels):
    if name == "auroc":
        return sklearn_metrics.roc_auc_score(labels, scores)
    if name == "average_precision":
        return sklearn_metrics.average_precision_score(labels, scores)
    curve = sklearn_metrics.precision_recall_curve(labels, scores)
    return sklearn_metrics.auc(curve[1], curve[0])


def random_case(seed, n, distinct, share):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=n)
    if distinct:
        scores = np.round(scores * distinct) / distinct
    labels = rng.random(n) < share
    labels[:2] = False, True
    return scores + labels * rng.normal(0.5, 1, n).round(distinct or 9), labels


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("distinct", [0, 1, 3])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.99])
def test_equals_sklearn(name, distinct, share):
    for seed, n in itertools.product(range(5), (2, 3, 17, 5000)):
        scores, labels = random_case(seed, n, distinct, share)
        assert METRICS[name](scores, labels) == pytest.approx(sklearn_value(name, scores, labels), abs=1e-12)


def cases(finite_width):
    score = st.one_of(st.sampled_from([0.0, -0.0, 1.0, 1.5]), st.floats(-1e6, 1e6, width=finite_width))
    return st.lists(st.tuples(score, st.booleans()), min_size=2, max_size=60).filter(
        lambda rows: len({label for _, label in rows}) == 2
    )


@given(cases(64))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_equals_sklearn_on_any_data(rows):
    scores, labels = map(np.array, zip(*rows, strict=True))
    for name, metric in METRICS.items():
        assert metric(scores, labels) == pytest.approx(sklearn_value(name, scores, labels), abs=1e-12)


@given(cases(64), st.sampled_from([2**9, 2**12, 2**20]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_bounds_contain_the_exact_value_on_any_data(rows, bins):
    scores, labels = map(np.array, zip(*rows, strict=True))
    assert_contained(scores, labels, bins)


def assert_contained(scores, labels, bins):
    ranking = StreamedRanking(bins)
    ranking.update(scores, labels)
    for name, metric in METRICS.items():
        bounded = getattr(ranking, name)()
        assert 0 <= bounded.low <= metric(scores, labels) <= bounded.high <= 1, name
        assert bounded.low <= bounded.value <= bounded.high, name
    return ranking


def test_roc_counts_every_pair():
    scores, labels = random_case(3, 60, 2, 0.4)
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]
    assert auroc(scores, labels) == np.mean(pairs)


def test_chunks_are_joined(monkeypatch):
    scores, labels = random_case(0, 1000, 0, 0.5)
    whole = [metric(scores, labels) for metric in METRICS.values()]
    monkeypatch.setattr("dinofast.metrics.ranking._CHUNK", 7)
    assert [metric(scores, labels) for metric in METRICS.values()] == pytest.approx(whole, abs=1e-14)


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: torch.from_numpy(a.copy()),
        lambda a: a.reshape(5, 4, 10),
        lambda a: a.tolist(),
        np.asfortranarray,
        lambda a: torch.from_numpy(a.copy()).reshape(5, 1, 40)[:, 0],
    ],
)
def test_arrays_tensors_and_lists_of_any_shape(convert):
    scores, labels = random_case(1, 200, 2, 0.3)
    assert auroc(convert(scores), convert(labels)) == auroc(scores, labels)
    assert auroc(scores, convert(labels.astype(np.float32))) == auroc(scores, labels)


def test_every_number_type():
    labels = np.array([0, 1, 0, 1, 1])
    values = np.array([1, 2, 2, 5, 0])
    expected = auroc(values, labels)
    for dtype in ("int8", "uint8", "uint64", "int64", "float16", "float32", "longdouble"):
        assert auroc(values.astype(dtype), labels) == expected
    for tensor_type in (torch.bfloat16, torch.float16, torch.int32):
        assert auroc(torch.tensor(values, dtype=tensor_type), torch.tensor(labels)) == expected


def test_neighboring_large_integers_are_distinct():
    assert auroc(np.array([2**62, 2**62 + 1]), [0, 1]) == 1.0


def test_one_bit_of_float32_decides():
    one = np.float32(1)
    assert auroc(np.array([one, np.nextafter(one, np.float32(2))]), [0, 1]) == 1.0


def test_infinities_rank_and_tie():
    scores = np.array([-np.inf, 0.0, np.inf, np.inf])
    assert auroc(scores, [0, 1, 0, 1]) == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert_contained(scores, np.array([0, 1, 0, 1]), 2**20)


def test_signed_zeros_tie():
    assert auroc([0.0, -0.0], [0, 1]) == auroc([-0.0, 0.0], [0, 1]) == 0.5


def test_inputs_stay_as_they_were():
    scores, labels = random_case(0, 50, 0, 0.5)
    before = scores.copy()
    auroc(scores, labels)
    np.testing.assert_array_equal(scores, before)


@pytest.mark.parametrize("function", [*METRICS.values(), lambda s, y: StreamedRanking().update(s, y)])
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, np.nan, np.nan], [0, 1, 1], "2 of 3 scores are NaN"),
        ([0.1, 0.2, 0.3], [0, 1, 2], "1 of 3 labels are neither 0 nor 1"),
        ([0.1, 0.2], [0, np.nan], "1 of 2 labels are neither"),
        ([0.1, 0.2], [0, 1, 1], r"shape \(2,\) and labels \(3,\)"),
        (np.zeros((2, 3)), np.zeros((3, 2)), r"shape \(2, 3\) and labels \(3, 2\)"),
        ([1j, 0], [0, 1], "complex128; give real numbers"),
    ],
)
def test_unusable_input_is_refused(function, scores, labels, message):
    with pytest.raises(InputError, match=message):
        function(scores, labels)


@pytest.mark.parametrize("metric", METRICS.values())
def test_one_class_and_nothing_are_refused(metric):
    with pytest.raises(InputError, match=r"all 2 labels are normal \(0\)"):
        metric([0.1, 0.2], [0, 0])
    with pytest.raises(InputError, match=r"all 2 labels are abnormal \(1\)"):
        metric([0.1, 0.2], [1, 1])
    with pytest.raises(InputError, match="scores are empty"):
        metric([], [])


def test_products_beyond_int64():
    a = np.full(3, 2**40)
    assert exact_dot(a, a) == 3 * 2**80


def test_counts_beyond_int32_and_products_beyond_int64():
    ranking = StreamedRanking(512)
    ranking.update([1.0, 4.0, 1.0, 4.0], [0, 0, 1, 1])
    ranking._counts *= 2**33
    assert ranking.auroc().value == 0.5
    assert ranking.auroc().high == 0.75
    assert ranking.average_precision().value == 0.5


@pytest.mark.parametrize("bins", [2**9, 2**14, 2**20])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.97])
def test_bounds_contain_the_exact_value_on_random_data(bins, share):
    for seed in range(4):
        scores, labels = random_case(seed, 20_000, 0, share)
        assert_contained(scores, labels, bins)


def within_one_bin(order, spacing):
    return 1 + spacing * np.arange(len(order), dtype=np.float64), np.array(order)


@pytest.mark.parametrize("bins", [2**9, 2**20])
def test_bounds_are_reached_by_adversarial_orders(bins):
    for p, n in itertools.product((1, 2, 3, 7), (1, 2, 9)):
        best, worst = within_one_bin([0] * n + [1] * p, 1e-9), within_one_bin([1] * p + [0] * n, 1e-9)
        top, bottom = assert_contained(*best, bins), assert_contained(*worst, bins)
        for name in METRICS:
            assert getattr(top, name)() == getattr(bottom, name)()
        assert bottom.auroc()[1:] == (0, 1)
        assert bottom.average_precision().high == pytest.approx(average_precision(*best))
        assert bottom.average_precision().low == pytest.approx(average_precision(*worst), abs=0.02)
        tied = within_one_bin([1] * p + [0] * n, 1e-9)
        tied[0][:p] = 1
        assert bottom.aupr().low == pytest.approx(aupr(*tied), abs=1e-11)
        assert bottom.aupr().high == pytest.approx(aupr(*best), abs=1e-11)


def test_bounds_meet_when_every_score_has_its_own_bin():
    scores, labels = 2.0 ** np.arange(-40, 40), np.random.default_rng(0).random(80) < 0.4
    ranking = assert_contained(scores, labels, 512)
    for name in METRICS:
        bounded = getattr(ranking, name)()
        assert bounded.high - bounded.low < 3e-12, name


def test_bounds_contain_every_order_of_small_bins():
    # two bins; inside each, every arrangement of positives, negatives and ties
    for levels in itertools.product(range(3), repeat=5):
        labels = np.array([1, 0, 1, 0, 1])
        scores = np.array([1, 1, 4, 4, 4]) + 1e-9 * np.array(levels)
        assert_contained(scores, labels, 512)


def test_error_is_at_most_the_share_of_pairs_in_one_bin():
    scores, labels = random_case(5, 3000, 0, 0.5)
    ranking = assert_contained(scores, labels, 512)
    keys = bin_index(scores, 512)
    p, n = (np.bincount(keys[labels == kind], minlength=512) for kind in (1, 0))
    bounded = ranking.auroc()
    assert bounded.high - bounded.value == pytest.approx((p * n).sum() / (2 * p.sum() * n.sum()))


def test_default_bounds_are_narrow():
    scores, labels = random_case(0, 100_000, 0, 0.05)
    ranking = assert_contained(scores, labels, 2**20)
    for name in METRICS:
        bounded = getattr(ranking, name)()
        assert bounded.high - bounded.low < 1e-3, (name, bounded)


def test_streaming_and_merging_equal_one_update(monkeypatch):
    monkeypatch.setattr("dinofast.metrics.streamed._CHUNK", 100)
    scores, labels = random_case(0, 1001, 0, 0.3)
    whole, left, right = StreamedRanking(), StreamedRanking(), StreamedRanking()
    whole.update(scores, labels)
    left.update(scores[:400], labels[:400])
    right.update(scores[400:], labels[400:])
    right.update([], [])
    left.merge(right)
    for name in METRICS:
        assert getattr(left, name)() == getattr(whole, name)()
    with pytest.raises(InputError, match=r"merge rankings of 512 and 1048576 bins"):
        left.merge(StreamedRanking(512))


def test_streamed_ranking_needs_both_classes():
    ranking = StreamedRanking()
    ranking.update([0.5, 0.6], [0, 0])
    for name in METRICS:
        with pytest.raises(InputError, match="0 abnormal and 2 normal scores"):
            getattr(ranking, name)()


@pytest.mark.parametrize("bins", [0, 1, 256, 1000, 2**27])
def test_number_of_bins_is_checked(bins):
    with pytest.raises(InputError, match="power of two"):
        StreamedRanking(bins)


@pytest.mark.parametrize("bins", [2**9, 2**20, 2**26])
def test_bins_rise_with_the_score(bins):
    rng = np.random.default_rng(0)
    tiny = np.float32(1e-45)
    scores = np.sort(
        np.concatenate(
            [
                rng.normal(size=500),
                np.exp(rng.uniform(-100, 88, 500)),
                -np.exp(rng.uniform(-100, 88, 500)),
                [-np.inf, -1e300, -3.4e38, -tiny, -0.0, 0.0, tiny, 3.4e38, 1e300, np.inf],
            ]
        )
    )
    keys = bin_index(scores, bins)
    assert (np.diff(keys) >= 0).all()
    assert keys.min() >= 0
    assert keys.max() < bins
    edges = np.array([bin_edge(int(key), bins) for key in keys])
    with np.errstate(over="ignore"):
        assert (scores.astype(np.float32) <= edges).all()
    np.testing.assert_array_equal(bin_index(edges, bins), keys)
    finite = np.isfinite(scores) & (np.abs(scores) > 1e-37) & (np.abs(scores) < 1e38)
    width = 2.0 ** (10 - bins.bit_length())
    assert (edges[finite] - scores[finite] <= width * np.abs(scores[finite])).all()


def test_threshold_is_the_smallest_edge_with_few_enough_above():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=10_000).astype(np.float32)
    ranking = StreamedRanking()
    ranking.update(scores, np.zeros(scores.size))
    ranking.update([100.0], [1])
    for allowed in (0, 1, 500, 9_999):
        edge, above = ranking.threshold(allowed)
        assert above == (scores > edge).sum() <= allowed
        below = bin_edge(int(bin_index(np.array([edge]), 2**20)[0]) - 1, 2**20)
        assert (scores > below).sum() > allowed
    for allowed in (-1, 10_000):
        with pytest.raises(InputError, match="allow 0 to 9999"):
            ranking.threshold(allowed)
