"""The memory bank against independent derivations in NumPy float64, SciPy and scikit-learn."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from bank_truth import (
    SIZE,
    clustered,
    features,
    scene,
    true_image_scores,
    true_map,
    true_mask,
    true_patch_scores,
    unit,
)

from dinofast.errors import InputError
from dinofast.models import create, searched
from dinofast.models.memory_bank import MemoryBank
from dinofast.models.row_store import RowStore
from dinofast.ops import providers


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
