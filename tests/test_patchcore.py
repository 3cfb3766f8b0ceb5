"""PatchCore against an independent derivation in NumPy float64, every switch of it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from textures import spoiled, weave

from dinofast import Detector
from dinofast.errors import ArtifactError, InputError
from dinofast.models import create
from dinofast.models.coreset import k_center
from dinofast.models.patchcore import PatchCore
from dinofast.types import Features

SIZE = (70, 61)
D = 12


def clustered(b, h, w, d=D, seed=0):
    rng = np.random.default_rng(seed)
    centers = 2 * np.random.default_rng(99).normal(size=(6, d))
    return (centers[rng.integers(6, size=(b, h, w))] + 0.3 * rng.normal(size=(b, h, w, d))).astype(np.float32)


def features(tokens, size=SIZE):
    return Features(torch.from_numpy(np.ascontiguousarray(tokens)), None, size)


def pooled(tokens, side, border, most=0):
    """Neighborhoods by explicit loops, channels by the bounds of each share."""
    h, w, d = tokens.shape[1:]
    r = side // 2
    found = np.zeros(tokens.shape)
    for y in range(h):
        for x in range(w):
            part = tokens[:, max(0, y - r) : y + r + 1, max(0, x - r) : x + r + 1].astype(float)
            count = side * side if border == "zeros" else part.shape[1] * part.shape[2]
            found[:, y, x] = part.sum((1, 2)) / count
    if not 0 < most < d:
        return found
    ends = [(i * d // most, -(-(i + 1) * d // most)) for i in range(most)]
    return np.stack([found[..., lo:hi].mean(-1) for lo, hi in ends], -1)


def greedy(rows, k, start, seed):
    """Farthest points, the starts drawn as the coreset draws them."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    to = lambda i: np.linalg.norm(rows - rows[i], axis=1)  # noqa: E731
    if start == "distance-norm":
        order = [int(np.argmax([np.linalg.norm(to(i)) for i in range(len(rows))]))]
    selected = [] if start == "mean-of-10" else order[:1]
    gap = np.mean([to(i) for i in (order[:10] if start == "mean-of-10" else selected)], axis=0)
    while len(selected) < k:
        gap[selected] = -1
        selected.append(int(gap.argmax()))
        gap = np.minimum(gap, to(selected[-1]))
    return rows[selected]


def truth(queries, bank, k=1, squared=False, b=1):
    """Patch scores (B, h, w) and image scores (B,)."""
    flat = queries.reshape(-1, queries.shape[-1])
    gap = np.linalg.norm(flat[:, None] - bank[None], axis=2)
    patches = np.sort(gap**2 if squared else gap, axis=1)[:, :k].mean(1).reshape(queries.shape[:3])
    nearest, scores = gap.argmin(1).reshape(len(queries), -1), []
    for image, own in enumerate(patches.reshape(len(queries), -1)):
        worst = int(own.argmax())
        q, m = queries[image].reshape(-1, queries.shape[-1])[worst], bank[nearest[image, worst]]
        around = bank[np.argsort(np.linalg.norm(bank - m, axis=1), kind="stable")[: min(b, len(bank))]]
        weight = np.exp(np.linalg.norm(q - m)) / np.exp(np.linalg.norm(q - around, axis=1)).sum()
        scores.append(own[worst] * (1 - weight if len(around) > 1 else 1))
    return patches, np.array(scores)


def true_map(patches, size, mode):
    patches = torch.from_numpy(patches)[:, None]
    if mode == "bilinear":
        up = F.interpolate(patches, size, mode="bilinear", align_corners=False)[:, 0].numpy()
        return np.stack([ndimage.gaussian_filter(m, sigma=4, truncate=4, mode="reflect") for m in up])
    up = F.interpolate(patches, size, mode="nearest")[:, 0].numpy()
    return np.stack([ndimage.gaussian_filter(m, sigma=4, truncate=4, mode="mirror") for m in up])


@pytest.mark.parametrize(
    ("compat", "squared", "start", "b", "mode"),
    [
        ("patchcore", True, "mean-of-10", 1, "bilinear"),
        ("anomalib-patchcore", False, "random-row", 9, "nearest"),
    ],
)
def test_each_recipe_equals_its_definition(compat, squared, start, b, mode):
    normal, tokens = clustered(3, 9, 8), clustered(2, 11, 7, seed=1)
    model = create("patchcore", compat=compat, projection="none", seed=3)
    model.fit([features(normal[:2]), features(normal[2:])])
    rows = pooled(normal, 3, "zeros").reshape(-1, D)
    bank = greedy(rows, int(0.1 * len(rows)), start, 3)
    np.testing.assert_allclose(model.bank, bank, rtol=1e-5, atol=1e-6)
    patches, scores = truth(pooled(tokens, 3, "zeros"), bank, squared=squared, b=b)
    found = model.score(features(tokens))
    np.testing.assert_allclose(model.patch_scores(features(tokens)), patches, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(found.score, scores, rtol=2e-5)
    np.testing.assert_allclose(found.map, true_map(patches, SIZE, mode), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("side", [1, 3, 5])
@pytest.mark.parametrize("border", ["zeros", "partial"])
@pytest.mark.parametrize("most", [0, 5, D, 99])
def test_pooling_of_neighborhoods_and_channels(side, border, most):
    normal = clustered(2, 4, 7)
    model = create("patchcore", neighborhood=side, border=border, max_channels=most, coreset_ratio=1.0)
    bank = model.fit([features(normal)]).bank
    expected = pooled(normal, side, border, most)
    np.testing.assert_allclose(bank, expected.reshape(-1, expected.shape[-1]), rtol=1e-5, atol=1e-6)
    assert model.n_channels == D


@pytest.mark.parametrize("b", [1, 2, 9, 500])
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("k", [1, 4])
def test_neighbors_metric_and_weight(k, metric, b):
    normal, tokens = clustered(2, 6, 6), clustered(3, 5, 6, seed=1)
    arguments = {"neighborhood": 1, "coreset_ratio": 1.0, "n_neighbors": k, "metric": metric, "n_reweight": b}
    model = create("patchcore", **arguments).fit([features(normal)])
    bank = normal.reshape(-1, D).astype(float)
    patches, scores = truth(tokens.astype(float), bank, k, metric == "sqeuclidean", b)
    np.testing.assert_allclose(model.patch_scores(features(tokens)), patches, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(model.score(features(tokens)).score, scores, rtol=2e-5)


@pytest.mark.parametrize("start", ["mean-of-10", "random-row", "distance-norm"])
@pytest.mark.parametrize("projection", ["none", "linear-128", "sparse-jl"])
def test_bank_is_the_greedy_coreset_unprojected(start, projection):
    normal = clustered(2, 8, 8, d=300)
    model = create("patchcore", start=start, projection=projection, seed=5, coreset_ratio=0.2)
    bank = model.fit([features(normal)]).bank
    rows = torch.from_numpy(pooled(normal, 3, "zeros").reshape(-1, 300)).float()
    index = k_center(rows, 25, start=start, projection=None if projection == "none" else projection, seed=5)
    torch.testing.assert_close(bank, rows[index], rtol=1e-5, atol=1e-6)
    if projection == "none":
        np.testing.assert_allclose(bank, greedy(rows.double().numpy(), 25, start, 5), rtol=1e-5, atol=1e-6)


def test_distances_that_would_overflow_the_exponential():
    normal, tokens = 1000 * clustered(2, 6, 6), 1000 * clustered(2, 6, 6, seed=1)
    model = create("patchcore", compat="anomalib-patchcore", coreset_ratio=0.5).fit([features(normal)])
    found = model.score(features(tokens)).score
    assert found.isfinite().all()
    assert (found >= 0).all()


def test_weight_with_duplicates_of_the_nearest_row():
    """Four rows at one place: none is alone, so a quarter of the score is lost."""
    row = np.random.default_rng(0).normal(size=D).astype(np.float32)
    normal = np.broadcast_to(row, (1, 2, 2, D))
    arguments = {"neighborhood": 1, "coreset_ratio": 1.0, "metric": "euclidean", "n_reweight": 4}
    model = create("patchcore", **arguments).fit([features(normal)])
    found = model.score(features(normal + np.eye(D, dtype=np.float32)[0]))
    np.testing.assert_allclose(found.score, 0.75, rtol=1e-5)


def test_the_seed_and_the_order_decide_the_coreset_and_batches_do_not():
    normal = clustered(4, 6, 6)
    bank = lambda tokens, seed: PatchCore(seed=seed).fit([features(t[None]) for t in tokens]).bank  # noqa: E731
    assert torch.equal(bank(normal, 1), PatchCore(seed=1).fit([features(normal)]).bank)
    assert not torch.equal(bank(normal, 1), bank(normal, 2))
    assert not torch.equal(bank(normal, 1), bank(normal[::-1], 1))


def test_a_coreset_of_nothing_is_refused():
    with pytest.raises(InputError, match=r"coreset_ratio=0\.1 of 9 normal patches keeps 0.*give more normal"):
        PatchCore().fit([features(clustered(1, 3, 3))])
    with pytest.raises(InputError, match="keeps 3, n_neighbors=4 needs as many"):
        PatchCore(n_neighbors=4).fit([features(clustered(1, 6, 6))])
    assert len(PatchCore().fit([features(clustered(1, 2, 5))]).bank) == 1


def test_one_row_has_nobody_around_it():
    model = PatchCore(compat="anomalib-patchcore").fit([features(clustered(1, 2, 5))])
    tokens = features(clustered(1, 4, 4, seed=2))
    assert model.score(tokens).score == model.patch_scores(tokens).max() > 0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"neighborhood": 2}, "neighborhood must be odd and at least 1, got 2"),
        ({"neighborhood": 3.0}, "neighborhood must be odd"),
        ({"border": "mirror"}, "unknown border 'mirror'; one of zeros, partial"),
        ({"max_channels": -1}, "max_channels must be a whole number, at least 0, got -1"),
        ({"coreset_ratio": 0}, r"coreset_ratio must be a finite number, in \(0, 1\], got 0"),
        ({"coreset_ratio": 1.1}, r"coreset_ratio must be a finite number, in \(0, 1\], got 1.1"),
        ({"start": "first"}, "unknown start 'first'; one of None, random-row, mean-of-10, distance-norm"),
        ({"projection": "pca"}, "unknown projection 'pca'; one of None, none, linear-128, sparse-jl"),
        ({"n_neighbors": None}, "n_neighbors must be a whole number, at least 1, got None"),
        ({"metric": "cosine"}, "unknown metric 'cosine'; one of None, euclidean, sqeuclidean"),
        ({"n_reweight": 0}, "n_reweight must be a whole number, at least 1, got 0"),
        ({"upsampling": "bicubic"}, "unknown upsampling 'bicubic'"),
        ({"sigma": -1.0}, "sigma must be a finite number, at least 0, got -1.0"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"compat": "paper"}, "unknown compat 'paper'; one of patchcore, anomalib-patchcore"),
    ],
)
def test_bad_parameters(params, message):
    with pytest.raises(InputError, match=message):
        PatchCore(**params)


def test_a_state_of_other_parameters_is_refused():
    state = PatchCore(max_channels=5).fit([features(clustered(1, 6, 6))]).state()
    with pytest.raises(
        ArtifactError, match=r"features of D = 12 must be \(M, 12\), M >= 1, this is \(3, 5\)"
    ):
        PatchCore(max_channels=0).load_state(state)
    with pytest.raises(ArtifactError, match="n_neighbors=4"):
        PatchCore(max_channels=5, n_neighbors=4).load_state(state)


def test_cross_fit_fits_each_part_anew_since_coresets_do_not_merge(lite0):
    images = [weave(i) for i in range(3)]
    make = lambda: PatchCore(coreset_ratio=0.5, seed=2)  # noqa: E731
    told = []
    detector = Detector(lite0, make()).fit(images)
    before = detector.model.bank
    threshold = detector.calibrate(images, cross_fit=3, fpr=0.1, progress=lambda *now: told.append(now))
    assert [done for _, done, total in told if total == 9][-1] == 9
    assert detector.model.bank is before
    maps = []
    for i, image in enumerate(images):
        others = Detector(lite0, make()).fit([other for j, other in enumerate(images) if j != i])
        maps.append(next(others.predict(image)).map.numpy())
    pooled_maps = np.sort(np.concatenate([m.ravel() for m in maps]))
    assert threshold.value == pytest.approx(pooled_maps[-1 - int(0.1 * pooled_maps.size)], rel=1e-4)


@pytest.mark.parametrize("compat", ["patchcore", "anomalib-patchcore"])
def test_detector_end_to_end(lite0, tmp_path, compat):
    model = create("patchcore", compat=compat, coreset_ratio=0.5)
    detector = Detector(lite0, model).fit([weave(i) for i in range(4)])
    detector.calibrate([weave(i) for i in range(10, 14)], fpr=0.05)
    (found,) = detector.predict(spoiled(20))
    normal = max(p.score for p in detector.predict([weave(i) for i in range(20, 24)]))
    assert found.score > 1.2 * normal
    assert found.map[64:, 64:].mean() > 1.5 * found.map[:48, :48].mean()
    detector.save(tmp_path / "d")
    again = next(Detector.load(tmp_path / "d", backbone=lite0).predict(spoiled(20)))
    assert torch.equal(again.map, found.map)
    assert torch.equal(again.mask, found.mask)
