"""The memory bank against independent derivations in NumPy float64, SciPy and scikit-learn."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from sklearn.decomposition import PCA

from dinofast.errors import InputError
from dinofast.models import create, searched
from dinofast.models.foreground import foreground_mask
from dinofast.models.memory_bank import MemoryBank
from dinofast.models.row_store import RowStore
from dinofast.ops import providers
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


@pytest.mark.parametrize("compat", ["anomalydino", "anomalib"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 3])
def test_scores_equal_the_definition(k, metric, compat):
    references, tokens = clustered(3, 9, 8), clustered(2, 16, 13, seed=1)
    model = create("memory_bank", n_neighbors=k, metric=metric, compat=compat)
    model.fit([features(references[:2]), features(references[2:])])
    patches = true_patch_scores(tokens, references, k, metric)
    np.testing.assert_allclose(model.patch_scores(features(tokens)), patches, rtol=2e-5, atol=1e-6)
    found = model.score(features(tokens))
    np.testing.assert_allclose(found.score, true_image_scores(patches), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(found.map, true_map(patches, SIZE, compat), rtol=2e-5, atol=1e-6)


def test_the_two_rules_differ():
    references, tokens = features(clustered(1, 9, 8)), features(clustered(1, 9, 8, seed=1))
    one, other = (MemoryBank(compat=c).fit([references]).score(tokens) for c in ("anomalydino", "anomalib"))
    assert torch.equal(one.score, other.score)
    assert (one.map - other.map).abs().max() > 1e-3


@pytest.mark.parametrize("sides", [(1, 1), (9, 11), (10, 10), (11, 18), (25, 12)])
def test_image_score_is_the_mean_of_the_top_percent(sides):
    references, tokens = clustered(2, 9, 8), clustered(3, *sides, seed=1)
    for compat in ("anomalydino", "anomalib"):
        found = MemoryBank(compat=compat).fit([features(references)]).score(features(tokens)).score
        expected = true_image_scores(true_patch_scores(tokens, references, 1, "cosine"))
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_bank_rows_have_unit_length_only_for_cosine():
    tokens = clustered(2, 5, 6)
    rows = MemoryBank().fit([features(tokens)]).bank
    np.testing.assert_allclose(rows, unit(tokens.reshape(-1, 24).astype(float)), atol=1e-6)
    rows = MemoryBank(metric="euclidean").fit([features(tokens)]).bank
    assert np.array_equal(rows, tokens.reshape(-1, 24))


def test_zero_patch_is_at_distance_one_from_everything():
    tokens = clustered(1, 5, 5)
    tokens[0, 2, 3] = 0
    model = MemoryBank().fit([features(clustered(1, 4, 4))])
    assert model.patch_scores(features(tokens))[0, 2, 3] == 1
    blank = MemoryBank().fit([features(np.zeros((1, 3, 3, 24)).astype(np.float32))])
    assert torch.equal(blank.patch_scores(features(tokens)), torch.ones(1, 5, 5))


def test_cosine_distance_stays_in_range_up_to_opposite():
    tokens = clustered(1, 4, 4)
    model = MemoryBank(compat="anomalib").fit([features(tokens[:, :1, :1])])
    found = model.patch_scores(features(-tokens))
    assert found.max() <= 2
    assert found[0, 0, 0] == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("morphology", ["1d", "2d"])
@pytest.mark.parametrize("sides", [(16, 16), (13, 21), (1, 40), (3, 2)])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_mask_equals_an_independent_derivation(morphology, sides, seed):
    tokens = np.stack([scene(*sides, seed=seed), scene(*sides, seed=seed + 10)])
    for threshold in (0.0, 4.0):
        found = foreground_mask(torch.from_numpy(tokens), threshold, morphology).numpy()
        assert np.array_equal(found, np.stack([true_mask(t, threshold, morphology) for t in tokens]))


def test_both_signs_of_the_component_occur():
    """Guard of the test above: its scenes reach the rule's two branches and both morphologies differ."""
    kept, differ = set(), False
    for seed in range(4):
        tokens = scene(16, 16, seed)
        t = PCA(n_components=1, svd_solver="full").fit_transform(tokens.reshape(-1, 20).astype(float))
        kept.add(bool((t.reshape(16, 16)[3:12, 3:12] > 4).sum() <= 0.35 * 81))
        differ |= not np.array_equal(true_mask(tokens, 4.0, "1d"), true_mask(tokens, 4.0, "2d"))
    assert kept == {True, False}
    assert differ


def test_keep_decides_whether_the_component_is_turned():
    tokens = torch.from_numpy(scene(16, 16))[None]
    turned, straight = (foreground_mask(tokens, 4.0, "2d", keep=keep) for keep in (1.0, 0.0))
    assert not torch.equal(turned, straight)
    assert torch.equal(turned, foreground_mask(-tokens, 4.0, "2d", keep=0.0))


def test_constant_image_has_no_foreground():
    for morphology in ("1d", "2d"):
        assert not foreground_mask(torch.full((2, 6, 6, 8), 3.3), 10.0, morphology).any()
    assert foreground_mask(torch.ones(0, 6, 6, 8), 10.0).shape == (0, 6, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.full((1, 4, 4, 3), torch.nan)}, "16 patches hold NaN or infinite"),
        ({"tokens": torch.ones(4, 4, 3)}, r"\(B, h, w, D\)"),
        ({"tokens": torch.ones(1, 0, 4, 3)}, "with patches"),
        ({"threshold": float("nan")}, "threshold must be finite"),
        ({"threshold": -1.0}, "threshold must be finite"),
        ({"morphology": "3d"}, "unknown morphology '3d'; one of 1d, 2d"),
        ({"border": 0.5}, "border must lie"),
        ({"keep": 1.1}, "keep in"),
    ],
)
def test_mask_refuses_bad_input(change, message):
    arguments = {"tokens": torch.randn(1, 4, 4, 3), "threshold": 1.0} | change
    with pytest.raises(InputError, match=message):
        foreground_mask(**arguments)


@pytest.mark.parametrize("compat", ["anomalydino", "anomalib"])
@pytest.mark.parametrize("mask_references", [None, False, True])
def test_masked_bank_equals_the_definition(compat, mask_references):
    threshold, morphology = 4.0, "1d" if compat == "anomalydino" else "2d"
    references = np.stack([scene(12, 14, seed=s) for s in (0, 2)])
    tokens = np.stack([scene(12, 14, seed=s) for s in (3, 4)])
    model = MemoryBank(
        masking=True,
        mask_threshold=threshold,
        mask_references=mask_references,
        compat=compat,
        metric="euclidean",
    ).fit([features(references)])
    rows = references.reshape(-1, 20)
    if mask_references or (mask_references is None and compat == "anomalib"):
        rows = rows[np.stack([true_mask(r, threshold, morphology) for r in references]).ravel()]
        assert len(rows) < 2 * 12 * 14
    assert model.bank.shape == rows.shape
    mask = np.stack([true_mask(t, threshold, morphology) for t in tokens])
    patches = np.where(mask, true_patch_scores(tokens, rows, 1, "euclidean"), 0)
    found = model.score(features(tokens))
    np.testing.assert_allclose(model.patch_scores(features(tokens)), patches, rtol=5e-4, atol=1e-5)
    np.testing.assert_allclose(found.score, true_image_scores(patches), rtol=5e-4, atol=1e-5)
    np.testing.assert_allclose(found.map, true_map(patches, SIZE, compat), rtol=5e-4, atol=1e-5)
    assert (patches == 0).any()


@pytest.mark.parametrize("mask_references", [True, False])
def test_masking_needs_a_threshold_before_the_work(mask_references):
    model = MemoryBank(masking=True, mask_references=mask_references)
    with pytest.raises(InputError, match=r"needs mask_threshold.*10\.0 for DINOv2"):
        model.fit([features(clustered(1, 4, 4))])
    model.mask_threshold = 0.5
    assert model.fit([features(scene(8, 8)[None])]).is_fitted


def test_masking_everything_away_is_an_error():
    model = MemoryBank(masking=True, mask_threshold=1e6, mask_references=True)
    with pytest.raises(InputError, match="bank has 0 rows, n_neighbors is 1; lower mask_threshold"):
        model.fit([features(clustered(1, 6, 6))])
    model = MemoryBank(masking=True, mask_threshold=1e6).fit([features(clustered(1, 6, 6))])
    found = model.score(features(clustered(2, 6, 6, seed=1)))
    assert not found.score.any()
    assert not found.map.any()


def test_fewer_rows_than_neighbors_is_an_error():
    with pytest.raises(InputError, match="bank has 4 rows, n_neighbors is 5; give more normal images"):
        MemoryBank(n_neighbors=5).fit([features(clustered(1, 2, 2))])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"compat": "faiss"}, "unknown compat 'faiss'; one of anomalydino, anomalib"),
        ({"metric": "dot"}, "unknown metric 'dot'; one of cosine, euclidean"),
        ({"n_neighbors": 0}, "n_neighbors must be a whole number, at least 1, got 0"),
        ({"sigma": -1.0}, "sigma must be finite"),
        ({"sigma": float("inf")}, "sigma must be finite"),
        ({"mask_references": True}, "needs masking=True"),
    ],
)
def test_parameters_out_of_range_are_refused(params, message):
    with pytest.raises(InputError, match=message):
        MemoryBank(**params)


def test_partial_fit_adds():
    tokens, query = clustered(3, 6, 6), features(clustered(2, 6, 6, seed=1))
    model = MemoryBank()
    for image in tokens:
        assert model.partial_fit(features(image[None])) is model
    whole = MemoryBank().fit([features(tokens)])
    assert torch.equal(model.bank, whole.bank)
    with pytest.raises(InputError, match="D, 24 and 25"):
        model.partial_fit(features(clustered(1, 6, 6, d=25)))
    assert torch.equal(model.score(query).map, whole.score(query).map)


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


def test_row_store_crosses_blocks(monkeypatch):
    monkeypatch.setattr(RowStore, "_BLOCK", 4 * 5 * 7)
    rows = torch.randn(60, 5)
    store = RowStore()
    for part in rows.split([1, 0, 2, 30, 6, 21]):
        store.append(part)
    assert len(store) == 60
    gathered = store.gather(None)
    assert torch.equal(gathered, rows)
    assert gathered.is_contiguous()


PEAK = """
import torch
from dinofast.models import create, searched
from dinofast.ops import providers
from dinofast.types import Features

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

torch.set_num_threads(1)
def batches(n):
    for _ in range(n):
        yield Features(torch.randn(2, 32, 32, 1024), None, (448, 448))

create("memory_bank").fit(batches(2))
before = peak()
model = create("memory_bank").fit(batches(40))
print(model.bank.numel() * 4 / 2**20, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_fit_does_not_hold_the_bank_twice():
    """A bank of 320 MiB from batches of 8 MiB took 390 to 420 MiB; twice the bank would be 640."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, env=environment
    ).stdout
    bank, extra = map(float, output.split())
    assert bank == 320
    assert extra < 1.5 * bank, f"{extra} MiB for a bank of {bank} MiB"


@pytest.mark.parametrize(("metric", "k"), [("cosine", 1), ("cosine", 3), ("euclidean", 1), ("euclidean", 3)])
def test_a_prepared_bank_changes_no_bit(metric, k, monkeypatch):
    references, tokens = features(clustered(4, 36, 36)), features(clustered(2, 20, 20, seed=1))
    model = MemoryBank(n_neighbors=k, metric=metric).fit([references])
    assert len(model.bank) >= searched.FEW
    state = model.state()
    found = model.patch_scores(tokens)
    if providers.no_codes(24):
        pytest.skip(providers.no_codes(24))
    assert model._prepared[2].rows.data_ptr() == model.bank.data_ptr()
    assert model._prepared[2].strategy != "float32" or not providers.has_int8()
    assert list(model.state()) == ["bank"]
    assert torch.equal(model.state()["bank"], state["bank"])
    assert torch.equal(model.patch_scores(tokens), found)
    with monkeypatch.context() as patch:
        patch.setattr(searched.providers, "no_codes", lambda d: "none here")
        model._prepared = None
        assert torch.equal(model.patch_scores(tokens), found)
        assert model._prepared is None
    monkeypatch.setattr(searched, "FEW", 10**9)
    np.testing.assert_allclose(model.patch_scores(tokens), found, rtol=0, atol=1e-6)


def test_a_prepared_bank_goes_with_its_rows(tmp_path):
    references, tokens = features(clustered(4, 36, 36)), features(clustered(1, 9, 9, seed=1))
    if providers.no_codes(24):
        pytest.skip(providers.no_codes(24))

    def prepared():
        model = MemoryBank().fit([references])
        model.patch_scores(tokens)
        assert model._prepared is not None
        return model

    other = MemoryBank().fit([tokens])
    for change in (
        lambda model: model.fit([references]),
        lambda model: model.partial_fit(tokens),
        lambda model: model.merge(other),
        lambda model: model.to("cpu"),
        lambda model: model.load_state(model.state()),
    ):
        model = prepared()
        change(model)
        assert model._prepared is None
    model = prepared()
    assert float(model.merge(other).patch_scores(tokens).max()) < 1e-6
    assert copy.deepcopy(model)._prepared is None
    model.bank.neg_()
    assert float(model.patch_scores(tokens).min()) > 0.1
    model.bank.mul_(3)  # not what a fit gives: searched as it is
    assert torch.isfinite(model.patch_scores(tokens)).all()
    assert model._prepared is None or model._prepared[2] is None
