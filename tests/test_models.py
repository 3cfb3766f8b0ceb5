"""One contract for every model in `dinofast.models.names()`."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dinofast import models, ops
from dinofast.capture.static import StaticOnly
from dinofast.errors import ArtifactError, InputError
from dinofast.text_vectors import TextVectors
from dinofast.types import Features, Scores

D, SIDE, SIZE = 16, 12, (48, 60)

BRIEF = {"n_layers": 2, "n_epochs": 40, "batch_size": 4, "learning_rate": 0.02}
ZERO_SHOT = {"n_epochs": 5, "batch_size": 2, "learning_rate": 0.003}
VARIANTS = {
    "dpmm": [
        {"n_components": 12, "n_epochs": 3, "batch_size": 2},
        {"n_components": 8, "n_epochs": 2, "scoring": "mixture", "covariance_type": "spherical"},
        {
            "n_components": 8,
            "n_epochs": 2,
            "scoring": "mahalanobis",
            "covariance_type": "full",
            "reg_covar": 1e-3,
            "compat": "anomalydino-dpmm",
        },
    ],
    "memory_bank": [
        {},
        {"n_neighbors": 3, "metric": "euclidean"},
        {"compat": "anomalib", "n_neighbors": 2},
        {"masking": True, "mask_threshold": 5.0, "mask_references": True},
    ],
    "spatial_ar": [
        {**BRIEF, "dilations": 1, "hidden": 128},
        {**BRIEF, "dilations": [1, 2], "hidden": 32, "direction": "mean"},
        {**BRIEF, "mode": "bidirectional", "direction": "min", "hidden": 8, "n_epochs": 12, "clip_norm": 1.0},
    ],
    "patchcore": [
        {},
        {"compat": "anomalib-patchcore", "border": "partial", "coreset_ratio": 0.3, "n_neighbors": 2},
        {"neighborhood": 1, "max_channels": 5, "coreset_ratio": 1.0},
    ],
    "support_kmeans": [
        {},
        {"foreground": "none", "match_descriptor": "mean_patch", "n_clusters": 5, "n_init": 2},
        {"foreground": "otsu", "match_descriptor": "mean_foreground_patch", "distance": "cosine"},
        {"foreground": "pca", "mask_threshold": 5.0, "n_clusters": 8, "sigma": 2.0},
        {"compat": "reported", "normalize": "dataset", "image_score": "max"},
    ],
    "zero_shot": [
        {"class_name": "lung", "image_score": "max"} | ZERO_SHOT,
        {"n_taps": 2, "compat": "ad-dinov3", "image_score": "mean"} | ZERO_SHOT,
    ],
}
CASES = [(name, params) for name in models.names() for params in VARIANTS.get(name, [{}])]
OTHER_PARAMS = {"memory_bank": {"n_neighbors": 5}, "support_kmeans": {"n_clusters": 7}}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    draw = torch.Generator().manual_seed(7)
    vectors = {name: F.normalize(torch.randn(2, 24, generator=draw), dim=1) for name in ("lung", "object")}
    path = tmp_path_factory.mktemp("text") / "text"
    TextVectors(vectors, "0" * 64, "a toy").save(path)
    return str(path)


@pytest.fixture(params=CASES, ids=[f"{n}-{'-'.join(map(str, p.values()))}" for n, p in CASES])
def make(request, text_file):
    name, params = request.param
    params = params | ({"text": text_file} if name == "zero_shot" else {})
    return lambda **changes: models.create(name, **params | changes)


def batch(tensor):
    """Images that are normal by their masks, with a class token and the gray of a bright object on black."""
    masks = torch.zeros(len(tensor), *SIZE, dtype=torch.bool, device=tensor.device)
    gray = torch.zeros(tensor.shape[:3], device=tensor.device)
    gray[:, 2:10, 2:10] = torch.linspace(0.4, 0.9, 64, device=tensor.device).view(8, 8)
    return Features(tensor, tensor.mean(dim=(1, 2)), SIZE, intensity=gray, masks=masks)


def normal(b=4, seed=0, d=D, dtype=torch.float32):
    """Images of an object on a background: six kinds of patch, each with its place, and noise."""
    draw = torch.Generator().manual_seed(9)
    kinds = torch.randn(6, d, generator=draw)
    kinds[:3, 0] += 30
    layout = torch.randint(3, 6, (SIDE, SIDE), generator=draw)
    layout[2:10, 2:10] = torch.randint(0, 3, (8, 8), generator=draw)
    noise = torch.randn(b, SIDE, SIDE, d, generator=torch.Generator().manual_seed(seed))
    return batch((kinds[layout] + 0.1 * noise).to(dtype))


@pytest.fixture(scope="module")
def kept():
    """What `learned` has fitted: configuration -> model."""
    return {}


@pytest.fixture
def learned(make, kept):
    """A copy of the model of `normal()`, which is fitted once."""
    model = make()
    key = repr(model.config())
    if key not in kept:
        kept[key] = model.fit([normal()])
    return copy.deepcopy(kept[key])


def with_foreign_patch(y=6, x=5, seed=77, side=1):
    """One image with patches of another kind, and the mask that says so."""
    features = normal(1, seed=seed)
    foreign = features.tensor[0, y : y + side, x : x + side]
    foreign *= -1
    foreign[..., 0] *= -1
    features.masks[0, y * 4 : (y + side) * 4, x * 5 : (x + side) * 5] = True
    return features


def close(found, expected):
    """Equal to float32: an operator may settle near-ties among neighbors by the order of the rows."""
    torch.testing.assert_close(found.score, expected.score, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.map, expected.map, rtol=1e-4, atol=1e-5)


def same(first, second):
    assert torch.equal(first.score, second.score)
    assert torch.equal(first.map, second.map)


def test_scores_have_the_promised_form(make):
    model = make()
    assert not model.is_fitted
    assert model.fit([normal()]) is model
    assert model.is_fitted
    scores, patches = model.score(normal(3, seed=5)), model.patch_scores(normal(3, seed=5))
    assert scores.score.shape == (3,)
    assert scores.map.shape == (3, *SIZE)
    assert patches.shape == (3, SIDE, SIDE)
    for tensor in (scores.score, scores.map, patches):
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()


def test_fit_twice_gives_the_same(make):
    model = make().fit([normal(), normal(seed=1)])
    first = model.state()
    model.fit([normal(), normal(seed=1)])
    for name, tensor in model.state().items():
        assert torch.equal(tensor, first[name])


def test_fit_replaces_what_was_learned(make):
    model = make().fit([normal(seed=3), normal(seed=4)]).fit([normal()])
    same(model.score(normal(seed=5)), make().fit([normal()]).score(normal(seed=5)))


def test_size_of_batches_does_not_matter_and_order_only_where_stated(make):
    whole = normal(6)
    parts = [whole.part(*ends) for ends in ((0, 3), (3, 4), (4, 6))]
    query = normal(2, seed=5)
    expected = make().fit([whole]).score(query)
    for batches in (parts, parts[::-1]) if make().order_free else (parts,):
        close(make().fit(iter(batches)).score(query), expected)


def test_split_fit_merge_equals_fit_of_the_whole(make):
    if not make().merges:
        model = make().fit([normal()])
        with pytest.raises(InputError, match="cannot be merged; fit one on all images"):
            model.merge(make().fit([normal()]))
        return
    batches = [normal(2, seed=s) for s in range(4)]
    first, second = make().fit(batches[:1]), make().fit(batches[1:])
    before = second.state()
    assert first.merge(second) is first
    found, expected = first.score(normal(seed=5)), make().fit(batches).score(normal(seed=5))
    close(found, expected)
    assert all(torch.equal(t, before[n]) for n, t in second.state().items())


def test_save_and_load_keep_every_number_and_the_bytes(make, tmp_path):
    model = make().fit([normal()])
    model.save(tmp_path / "a")
    loaded = models.load(tmp_path / "a")
    assert type(loaded) is type(model)
    assert loaded.params() == model.params()
    same(loaded.score(normal(seed=5)), model.score(normal(seed=5)))
    loaded.save(tmp_path / "b")
    make().fit([normal()]).save(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    same(type(model).load(tmp_path / "a").score(normal(seed=5)), model.score(normal(seed=5)))


def test_state_and_config_rebuild_the_model(learned):
    rebuilt = models.restore(learned.config(), learned.state())
    same(rebuilt.score(normal(seed=5)), learned.score(normal(seed=5)))


def test_foreign_patch_scores_higher_there(make):
    lessons = [normal(seed=s) for s in range(3)]
    if make().learns_from_masks:
        lessons += [with_foreign_patch(y, x, y + x, side=4) for y in (2, 4, 6) for x in (2, 4, 6)]
    model = make().fit(lessons)
    clean, foreign = model.score(normal(1, seed=77)), model.score(with_foreign_patch())
    assert foreign.score > clean.score
    rise = (foreign.map - clean.map)[0]
    y, x = divmod(int(rise.argmax()), SIZE[1])
    assert abs((y + 0.5) * SIDE / SIZE[0] - 6.5) <= 1
    assert abs((x + 0.5) * SIDE / SIZE[1] - 5.5) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_work(make, dtype):
    model = make().fit([normal(dtype=dtype)])
    found = model.score(normal(1, seed=5, dtype=dtype))
    assert found.score.dtype == found.map.dtype == torch.float32
    torch.testing.assert_close(
        found.score, make().fit([normal()]).score(normal(1, seed=5)).score, rtol=0.2, atol=1e-3
    )


def test_single_image_and_empty_batch(make):
    model = make().fit([Features(torch.zeros(0, 5, 5, D + 1), None, SIZE), normal(1)])
    found = model.score(batch(torch.zeros(0, SIDE, SIDE, D)))
    assert found.score.shape == (0,)
    assert found.map.shape == (0, *SIZE)


def test_gradients_stay_out(make):
    features = normal(1)
    features.tensor.requires_grad_()
    model = make().fit([features])
    assert not any(t.requires_grad for t in model.state().values())
    assert not model.score(features).map.requires_grad


def broken_stream():
    yield normal(2, seed=8)
    raise KeyboardInterrupt


def nan_batch():
    features = normal(2)
    features.tensor[0, 3, 4, 5] = torch.nan
    features.tensor[1, 0, 0, 2] = torch.inf
    return features


FAILURES = {
    "interrupted": (broken_stream, KeyboardInterrupt, None),
    "empty": (list, InputError, "no images to learn from"),
    "no images": (lambda: [Features(torch.zeros(0, 3, 3, D), None, SIZE)], InputError, "no images"),
    "NaN": (lambda: [normal(), nan_batch()], InputError, "2 of 288 patches hold NaN or infinite .*float16"),
    "D": (lambda: [normal(), normal(d=D + 1)], InputError, "D differs between batches, 16 and 17"),
    "one batch": (normal, InputError, r"iterable of Features, got one batch; pass \[features\]"),
    "no batches": (lambda: 5, InputError, "expected an iterable of Features, got int"),
    "a tensor": (lambda: [normal().tensor], InputError, "expected dinofast.Features, got Tensor"),
    "integers": (lambda: [Features(torch.ones(1, 2, 2, D).long(), None, SIZE)], InputError, "floating-point"),
    "no grid": (lambda: [Features(torch.ones(1, 0, 2, D), None, SIZE)], InputError, "no patches"),
    "no size": (lambda: [Features(torch.ones(1, 2, 2, D), None, (0, 9))], InputError, "image_size"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failed_fit_leaves_the_model_as_it_was(make, learned, failure):
    batches, error, message = FAILURES[failure]
    fresh = make()
    with pytest.raises(error, match=message):
        fresh.fit(batches())
    assert not fresh.is_fitted
    before = learned.score(normal(seed=5))
    with pytest.raises(error, match=message):
        learned.fit(batches())
    same(learned.score(normal(seed=5)), before)


def test_unfitted_model_says_so(make, tmp_path):
    for use in (
        lambda: make().score(normal()),
        lambda: make().patch_scores(normal()),
        lambda: make().save(tmp_path / "a"),
        *([lambda: make().merge(make().fit([normal()]))] if make().merges else []),
        *([lambda: make().fit([normal()]).merge(make())] if make().merges else []),
    ):
        with pytest.raises(InputError, match="not fitted; call fit"):
            use()
    assert not list(tmp_path.iterdir())


def test_scoring_refuses_other_d_and_nan(learned):
    with pytest.raises(InputError, match=r"fitted on features with D = 16, these have D = 17; .*backbone"):
        learned.score(normal(d=D + 1))
    with pytest.raises(InputError, match="2 of 288 patches hold NaN"):
        learned.score(nan_batch())


def test_scoring_names_the_type_that_it_was_given(learned):
    with pytest.raises(InputError, match=r"expected dinofast\.Features, got ndarray"):
        learned.score(normal().tensor.numpy())
    with pytest.raises(InputError, match=r"expected dinofast\.Features, got int"):
        learned.patch_scores(features=5)


def test_device_mismatch_names_both_and_the_remedy(learned):
    learned.to("meta")
    with pytest.raises(InputError, match=r"is on meta, the features on cpu; .*model\.to\('cpu'\)"):
        learned.score(normal())


def test_arrays_of_numpy_are_not_copied_and_come_back(make, learned, monkeypatch):
    def arrays(features):
        given = {n: getattr(features, n).numpy() for n in ("tensor", "cls", "intensity", "masks")}
        return replace(features, **given)

    model, query, seen = make().fit(map(arrays, [normal()])), arrays(normal(3, seed=5)), []
    check = type(model)._check_queries
    watch = lambda self, x: seen.append((x.tensor.data_ptr(), x.cls.data_ptr())) or check(self, x)  # noqa: E731
    monkeypatch.setattr(type(model), "_check_queries", watch)
    found, patches = model.score(query), model.patch_scores(query)
    assert set(seen) == {tuple(x.__array_interface__["data"][0] for x in (query.tensor, query.cls))}
    assert type(found.score) is type(found.map) is type(patches) is np.ndarray
    same(Scores(*map(torch.from_numpy, (found.score, found.map))), learned.score(normal(3, seed=5)))
    assert torch.equal(torch.from_numpy(patches), learned.patch_scores(normal(3, seed=5)))


@pytest.mark.needs_cuda
def test_model_on_a_gpu_gives_the_same(make):
    expected = make().fit([normal()]).score(normal(seed=5))
    query = batch(normal(seed=5).tensor.cuda())
    moved, fitted = make().fit([normal()]).to("cuda"), make().fit([batch(normal().tensor.cuda())])
    for model in (moved, fitted):
        assert model.device.type == "cuda"
        found = model.score(query)
        found = Scores(found.score.cpu(), found.map.cpu())
        if model is moved or model.order_free:
            close(found, expected)
        else:  # epochs of training enlarge what the two devices round differently
            assert bool(found.score.isfinite().all() and found.map.isfinite().all())


def test_merge_refuses_what_does_not_belong(make, learned):
    if not learned.merges:
        pytest.skip("this model does not merge at all")
    before = learned.score(normal(seed=5))
    with pytest.raises(InputError, match="different parameters"):
        learned.merge(make(**OTHER_PARAMS[learned.name]).fit([normal()]))
    with pytest.raises(InputError, match="different D, 16 and 17"):
        learned.merge(make().fit([normal(d=D + 1)]))
    with pytest.raises(InputError, match="cannot merge a dict"):
        learned.merge({})
    same(learned.score(normal(seed=5)), before)


def test_state_that_does_not_fit_is_refused(learned):
    before = learned.score(normal(seed=5))
    for state in ({}, {"other": torch.ones(2)}, {n: t[..., None] for n, t in learned.state().items()}):
        with pytest.raises(ArtifactError):
            learned.load_state(state)
    same(learned.score(normal(seed=5)), before)


def test_constructor_arguments_are_stored_unchanged(make):
    model = make()
    assert list(model.params()) == model.param_names()
    assert type(model)(**model.params()).params() == model.params()
    assert repr(model).startswith(type(model).__name__)


def test_scoring_waits_for_no_value_unless_the_model_says_so(learned):
    model, features = learned, normal(2, seed=5)
    searched = model.name in ("patchcore", "support_kmeans") or getattr(model, "n_neighbors", 1) > 1
    if "cpu" in ops.MISSING and searched and model.waits_for() is None:
        pytest.skip("without native kernels knn_topk runs as its reference, which waits")
    same(model.score_unseen(features), model.score(features))
    if model.waits_for() is None:
        with StaticOnly("it"):
            found = model.score_unseen(features)
        same(found, model.score(features))
    else:
        with pytest.raises(InputError, match="it cannot be captured"), StaticOnly("it"):
            model.score_unseen(features)
