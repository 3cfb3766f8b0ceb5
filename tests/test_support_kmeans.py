"""Support images against an independent derivation in NumPy float64, every switch of it."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from support_truth import PCA_THRESHOLD, SIZE, D, E, Truth, features, otsu, scenes
from test_kmeans import unit
from textures import spoiled, weave

from dinofast import Detector, backbone, data, models
from dinofast.backbone.preprocess import normalize, patch_gray
from dinofast.errors import ArtifactError, InputError
from dinofast.models import create
from dinofast.models.foreground import otsu_mask
from dinofast.models.support_kmeans import SupportKMeans
from dinofast.stream import Embedder

SWITCHES = [
    {},
    {"n_clusters": 1},
    {"n_clusters": 4, "n_support": 3, "seed": 5},
    {"n_clusters": 4, "n_support": 2, "aggregate": "mean"},
    {"match_descriptor": "mean_patch", "foreground": "none"},
    {"match_descriptor": "mean_foreground_patch", "foreground": "otsu"},
    {"match_descriptor": "mean_foreground_patch", "foreground": "pca", "mask_threshold": PCA_THRESHOLD},
    {"intensity_threshold": 0.4, "mask_query_background": False},
    {"distance": "cosine", "n_clusters": 3},
    {"normalize": "image"},
    {"normalize": "dataset", "aggregate": "mean"},
    {"normalize": "image", "mask_query_background": False},
    {"normalize": "dataset", "foreground": "none"},
    {"compat": "reported"},
    {"compat": "reported", "foreground": "none"},
    {"compat": "reported", "aggregate": "max", "normalize": "none"},
]


@pytest.mark.parametrize("params", SWITCHES, ids=lambda p: "-".join(f"{n}={v}" for n, v in p.items()))
def test_scores_equal_the_definition(params):
    normal, query = scenes(5), scenes(4, 11, 7, seed=1)
    model = create("support_kmeans", **params)
    model.fit([features(*(x[:3] for x in normal)), features(*(x[3:] for x in normal))])
    truth = Truth(model, *normal)
    near, patches = zip(*(truth.patches(*image) for image in zip(*query, strict=True)), strict=True)
    found = features(*query)
    assert model.match(found).tolist() == np.stack(near).tolist()
    np.testing.assert_allclose(model.patch_scores(found), np.stack(patches), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(model.state()["centroids"].numpy(), truth.prototypes, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.0, 2.0])
@pytest.mark.parametrize("upsampling", ["bilinear", "nearest"])
def test_map_and_image_score(upsampling, sigma):
    model = SupportKMeans(upsampling=upsampling, sigma=sigma).fit([features(*scenes(3))])
    query = features(*scenes(2, 20, 21, seed=1))
    patches = model.patch_scores(query).double()
    align = {"align_corners": False} if upsampling == "bilinear" else {}
    expected = F.interpolate(patches[:, None], SIZE, mode=upsampling, **align)[:, 0].numpy()
    if sigma:
        expected = np.stack(
            [ndimage.gaussian_filter(m, sigma=sigma, truncate=4, mode="reflect") for m in expected]
        )
    found = model.score(query)
    np.testing.assert_allclose(found.map, expected, rtol=1e-5, atol=1e-6)
    flat = patches.flatten(1).sort(dim=1).values
    np.testing.assert_allclose(found.score, flat[:, -4:].mean(1), rtol=1e-5)
    largest = SupportKMeans(image_score="max").fit([features(*scenes(3))]).score(query).score
    np.testing.assert_allclose(largest, flat[:, -1], rtol=1e-5)


def test_init_starts_and_iterations_reach_the_kmeans():
    normal = features(*scenes(4))
    base = SupportKMeans(n_clusters=3).fit([normal]).state()["centroids"]
    for other in ({"init": "random-rows"}, {"n_init": 8}, {"n_iter": 1}, {"tol": 0.5}, {"seed": 3}):
        assert not torch.equal(SupportKMeans(n_clusters=3, **other).fit([normal]).state()["centroids"], base)


def test_an_image_has_the_same_prototypes_in_any_company():
    normal = features(*scenes(4))
    whole = SupportKMeans(seed=2).fit([normal]).state()["centroids"]
    for i in range(4):
        torch.testing.assert_close(
            SupportKMeans(seed=2).fit([normal.part(i, i + 1)]).state()["centroids"][0], whole[i]
        )


def test_a_normal_image_is_matched_with_itself_and_its_prototypes_are_near():
    normal = features(*scenes(6))
    model = SupportKMeans(n_clusters=99).fit([normal])
    assert model.match(normal).flatten().tolist() == list(range(6))
    assert model.n_images == 6
    assert model.patch_scores(normal).max() < 1e-6  # every foreground patch is its own prototype


def test_all_queries_search_the_pool_in_one_call(monkeypatch):
    from dinofast.models import support_kmeans

    model = SupportKMeans(n_support=2).fit([features(*scenes(6))])
    calls, search = [], support_kmeans.knn_topk
    monkeypatch.setattr(
        support_kmeans, "knn_topk", lambda *args: calls.append([*map(np.shape, args)]) or search(*args)
    )
    model.score(features(*scenes(4, seed=1)))
    assert calls == [[(4, E), (6, E), ()]]


def test_more_clusters_than_foreground_patches_leave_no_empty_prototype_in_the_mean():
    tokens, cls, gray = scenes(2)
    gray[:] = 0
    gray[:, 4, 3:6] = 0.5
    model = SupportKMeans(n_clusters=8, aggregate="mean").fit([features(tokens, cls, gray)])
    assert model.state()["n_centroids"].tolist() == [3, 3]
    rows = unit(tokens.astype(float))[:, 4, 3:6]
    expected = 1 - np.einsum("bnd,bkd->bnk", rows, rows).mean(2)
    np.testing.assert_allclose(
        model.patch_scores(features(tokens, cls, gray))[:, 4, 3:6], expected, atol=1e-6
    )


def test_images_without_foreground(caplog):
    tokens, cls, gray = scenes(3)
    gray[1] = 0
    with caplog.at_level(logging.WARNING, logger="dinofast.models"):
        model = SupportKMeans().fit([features(tokens, cls, gray)])
    assert "1 of 3 normal images have no foreground by the rule 'intensity' and are left out" in caplog.text
    assert model.n_images == 2
    assert not model.patch_scores(features(tokens, cls, gray))[1].any()
    unmasked = SupportKMeans(
        mask_query_background=False, match_descriptor="mean_foreground_patch", compat="reported"
    )
    found = unmasked.fit([features(tokens, cls, gray)]).patch_scores(features(tokens, cls, gray))
    assert (found[1].min(), found[1].max()) == (0, 1)
    with pytest.raises(
        InputError, match=r"n_support=3 needs as many.*, 2 are left: 1 of 3 normal images have no"
    ):
        SupportKMeans(n_support=3).fit([features(tokens, cls, gray)])
    gray[:] = 0
    with pytest.raises(
        InputError, match="3 of 3 normal images have no foreground by the rule 'intensity'; choose"
    ):
        model.fit([features(tokens, cls, gray)])
    assert model.n_images == 2
    with pytest.raises(
        InputError, match="3 of 3 normal images have no foreground by the rule 'otsu'; choose"
    ):
        SupportKMeans(foreground="otsu").fit([features(tokens, cls, gray)])


def test_a_query_of_one_value_has_nothing_that_stands_out():
    tokens, cls, gray = scenes(2)
    model = SupportKMeans(compat="reported", foreground="none").fit([features(tokens, cls, gray)])
    same = np.broadcast_to(tokens[:1, :1, :1], (1, 5, 5, D))
    assert model.patch_scores(features(same, cls[:1], None)).abs().max() < 1e-5
    exact = SupportKMeans(normalize="dataset", n_clusters=99).fit([features(tokens, cls, gray)])
    assert exact.patch_scores(features(tokens, cls, gray)).abs().max() < 1e-5


def test_one_normal_image_and_too_few():
    one = features(*scenes(1))
    assert SupportKMeans().fit([one]).score(features(*scenes(2, seed=1))).score.isfinite().all()
    with pytest.raises(InputError, match=r"n_support=2 needs as many.*, 1 are left: give more normal images"):
        SupportKMeans(n_support=2).fit([one])


def test_missing_class_tokens_and_intensity_name_the_remedy():
    tokens, cls, gray = scenes(2)
    with pytest.raises(InputError, match=r"these features have none.*choose match_descriptor='mean_patch'"):
        SupportKMeans().fit([features(tokens, None, gray)])
    for rule in ("intensity", "otsu"):
        with pytest.raises(InputError, match=f"foreground='{rule}' needs Features.intensity.*Detector"):
            SupportKMeans(foreground=rule).fit([features(tokens, cls, None)])
    with pytest.raises(InputError, match="foreground='pca' needs mask_threshold"):
        SupportKMeans(foreground="pca").fit([features(tokens, cls, None)])
    model = SupportKMeans().fit([features(tokens, cls, gray)])
    with pytest.raises(InputError, match="these features have none"):
        model.score(features(tokens, None, gray))
    with pytest.raises(InputError, match=r"needs Features\.intensity"):
        model.score(features(tokens, cls, None))


def test_scoring_looks_at_class_tokens_once(monkeypatch):
    tokens, cls, gray = scenes(2)
    model = SupportKMeans().fit([features(tokens, cls, gray)])
    batch, looked, isfinite = features(tokens, cls, gray), [], torch.Tensor.isfinite

    def counted(tensor):
        looked.append(tensor.shape == batch.cls.shape)
        return isfinite(tensor)

    monkeypatch.setattr(torch.Tensor, "isfinite", counted)
    model.score(batch)
    assert sum(looked) == 1


def test_broken_class_tokens_and_intensity_are_refused():
    tokens, cls, gray = scenes(2)
    model = SupportKMeans().fit([features(tokens, cls, gray)])
    for use in (model.score, model.patch_scores, model.match, lambda batch: SupportKMeans().fit([batch])):
        for wrong in (cls[:1], cls[0]):
            with pytest.raises(InputError, match="class tokens must be one row for each of 2 images"):
                use(features(tokens, wrong, gray))
        with pytest.raises(InputError, match="class tokens hold NaN or infinite values"):
            use(features(tokens, cls * np.nan, gray))
    for wrong in (gray - 1, gray + 1, gray * np.nan, gray[:, :3]):
        with pytest.raises(InputError, match=r"intensity must be \(2, 9, 8\) with values in \[0, 1\]"):
            model.score(features(tokens, cls, wrong))
    with pytest.raises(InputError, match="class tokens have 3 channels, those of the fit 7"):
        model.score(features(tokens, cls[:, :3], gray))
    with pytest.raises(InputError, match="class tokens differ between batches, 7 and 3 channels"):
        model.fit([features(tokens, cls, gray), features(tokens, cls[:, :3], gray)])
    with pytest.raises(InputError, match="different numbers of channels"):
        model.merge(SupportKMeans().fit([features(tokens, cls[:, :3], gray)]))


def test_a_state_that_does_not_hold_together_is_refused():
    model = SupportKMeans(n_clusters=2).fit([features(*scenes(3))])
    state = model.state()
    for name, wrong in (
        ("n_centroids", torch.tensor([1, 2, 3])),
        ("n_centroids", torch.tensor([1, 2])),
        ("centroids", state["centroids"].double()),
        ("centroids", state["centroids"][:, :1]),
        ("descriptors", torch.tensor(1.0)),
        ("similarity_range", torch.zeros(3, 3)),
    ):
        with pytest.raises(ArtifactError, match="n_clusters=2 and n_support=1 must hold"):
            model.load_state({**state, name: wrong})
    with pytest.raises(ArtifactError, match="n_support=4"):
        SupportKMeans(n_support=4).load_state(state)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_clusters": 0}, "n_clusters must be a whole number"),
        ({"n_support": 0}, "n_support must be a whole number, at least 1, got 0"),
        ({"match_descriptor": "auto"}, "unknown match_descriptor 'auto'; one of cls, mean_patch"),
        ({"foreground": "ct"}, "unknown foreground 'ct'; one of intensity, pca, otsu, none"),
        ({"intensity_threshold": 1.0}, r"intensity_threshold must be a finite number, in \[0, 1\), got 1.0"),
        ({"aggregate": "sum"}, "unknown aggregate 'sum'; one of None, max, mean"),
        ({"normalize": "minmax"}, "unknown normalize 'minmax'; one of None, none, image, dataset"),
        ({"mask_query_background": True, "foreground": "none"}, "needs a foreground rule"),
        ({"init": "first"}, "unknown init"),
        ({"upsampling": "cubic"}, "unknown upsampling"),
        ({"sigma": -1.0}, "sigma must be a finite number, at least 0, got -1.0"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"image_score": "mean"}, "unknown image_score 'mean'; one of top-percent, max"),
        ({"compat": "paper"}, "unknown compat 'paper'; one of None, reported"),
    ],
)
def test_bad_parameters(params, message):
    with pytest.raises(InputError, match=message):
        SupportKMeans(**params)


def test_otsu_equals_trying_every_threshold():
    rng = np.random.default_rng(0)
    for image in range(30):
        values = rng.uniform(size=(1, 6, 7)) ** rng.uniform(0.3, 4)
        values = np.round(values * 7) / 7 if image % 2 else values
        assert (otsu_mask(torch.from_numpy(values))[0].numpy() == otsu(values[0])).all()
    assert not otsu_mask(torch.full((2, 3, 3), 0.4)).any()
    assert otsu_mask(torch.zeros(0, 3, 3)).shape == (0, 3, 3)


@pytest.mark.parametrize("size", [(32, 48), (33, 50)])
def test_gray_of_patches(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    found = patch_gray(normalize(image)[None], (2, 3))[0]
    for y in range(2):
        for x in range(3):
            rows = slice(y * size[0] // 2, -(-(y + 1) * size[0] // 2))
            columns = slice(x * size[1] // 3, -(-(x + 1) * size[1] // 3))
            assert float(found[y, x]) == pytest.approx(image[rows, columns].mean() / 255, abs=1e-6)
    for value in (0, 255):
        blank = patch_gray(normalize(np.full((32, 32, 3), value, np.uint8))[None], (2, 2))
        torch.testing.assert_close(blank, torch.full((1, 2, 2), value / 255))
        assert blank.min() >= 0
        assert blank.max() <= 1


@pytest.mark.parametrize("name", ["lite0", "dino"])
def test_the_stream_fills_in_gray_on_the_grid_when_asked(lite0, name):
    used = lite0 if name == "lite0" else backbone.load("random:dinov2-small", size=56, device="cpu")
    image = np.repeat(np.linspace(0, 255, 100).astype(np.uint8)[:, None, None], 90, 1).repeat(3, 2)
    samples = data.samples([image, image])
    (plain,) = Embedder(used).batches(samples, "fit")
    assert plain.features.intensity is None
    (batch,) = Embedder(used, intensity=True).batches(samples, "fit")
    gray = batch.features.intensity
    assert gray.shape == batch.features.tensor.shape[:3]
    pixels = used.preprocess.resized(image)
    p = used.patch_size
    expected = pixels.reshape(gray.shape[1], p, gray.shape[2], p, 3).mean((1, 3, 4)) / 255
    np.testing.assert_allclose(gray[1], expected, atol=1e-6)
    for rows, part in batch.by_size():
        assert torch.equal(part.intensity, gray[rows.start : rows.stop])


def on_black(image):
    """The cloth as an object on black, as scans are."""
    framed = np.zeros((160, 160, 3), np.uint8)
    framed[32:128, 32:128] = image
    return framed


@pytest.mark.parametrize("params", [{}, {"foreground": "otsu", "n_support": 2}, {"compat": "reported"}])
def test_detector_end_to_end(lite0, tmp_path, params):
    model = models.create("support_kmeans", match_descriptor="mean_foreground_patch", n_clusters=4, **params)
    detector = Detector(lite0, model).fit([on_black(weave(i)) for i in range(5)])
    detector.calibrate([on_black(weave(i)) for i in range(10, 14)], fpr=0.05)
    (found,) = detector.predict(on_black(spoiled(20)))
    assert found.map[96:128, 96:128].mean() > 1.5 * found.map[32:80, 32:80].mean()
    normal = list(detector.predict([on_black(weave(i)) for i in range(20, 24)]))
    if "compat" in params:  # every image has a patch of score 1
        assert {p.score for p in normal} == {1.0}
    else:
        assert found.score > 1.2 * max(p.score for p in normal)
        assert not found.map[:8].any()
    detector.save(tmp_path / "d")
    again = next(Detector.load(tmp_path / "d", backbone=lite0).predict(on_black(spoiled(20))))
    assert torch.equal(again.map, found.map)
    detector.fit([on_black(weave(i)) for i in range(5)])
    assert detector.calibrate([on_black(weave(i)) for i in range(5)], cross_fit=2).n_images == 5


def test_detector_without_class_tokens_says_what_to_choose(lite0):
    with pytest.raises(InputError, match=r"efficientnet-lite0 has none.*match_descriptor=.mean_patch"):
        Detector(lite0, "support_kmeans").fit([weave(0)])


def test_detector_fills_in_the_published_mask_threshold():
    dino = backbone.load("random:dinov2-small", size=56, device="cpu")
    assert Detector(dino, SupportKMeans(foreground="pca")).model.mask_threshold == 10.0
    assert Detector(dino, SupportKMeans()).model.mask_threshold is None
