"""Models that search rows: prepared or not, the same bits; and learning on, for models that merge."""

import copy

import pytest
import torch

from dinofast import models
from dinofast.errors import InputError
from dinofast.models import memory_bank, searched
from dinofast.models.memory_bank import MemoryBank
from dinofast.models.patchcore import PatchCore
from dinofast.ops import providers
from dinofast.types import Features

needs_codes = pytest.mark.skipif(bool(providers.no_codes(24)), reason=str(providers.no_codes(24)))


def clustered(b, side, seed=0):
    """Patches around 40 centers, cls and gray with them."""
    centers = torch.randn(40, 24, generator=torch.Generator().manual_seed(9))
    draw = torch.Generator().manual_seed(seed)
    kinds = torch.randint(40, (b, side, side), generator=draw)
    tensor = centers[kinds] + 0.1 * torch.randn(b, side, side, 24, generator=draw)
    return Features(tensor, tensor.mean(dim=(1, 2)), (4 * side, 4 * side), tensor[..., 0].sigmoid())


@needs_codes
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("compat", ["patchcore", "anomalib-patchcore"])
def test_patchcore_through_a_prepared_bank_changes_no_bit(compat, k, monkeypatch):
    model = PatchCore(compat=compat, n_neighbors=k, coreset_ratio=1.0).fit([clustered(4, 36)])
    assert len(model.bank) >= searched.FEW
    query = clustered(3, 11, seed=1)
    monkeypatch.setattr(searched, "FEW", 10**9)
    plain, patches = model.score(query), model.patch_scores(query)
    assert model._prepared is None
    monkeypatch.setattr(searched, "FEW", 4096)
    found = model.score(query)
    assert model._prepared[2].rows.data_ptr() == model.bank.data_ptr()
    assert model._prepared[2].metric == {"patchcore": "sqeuclidean"}.get(compat, "euclidean")
    assert torch.equal(found.score, plain.score)
    assert torch.equal(found.map, plain.map)
    assert torch.equal(model.patch_scores(query), patches)
    assert list(model.state()) == ["bank", "n_channels"]


@needs_codes
def test_the_prepared_bank_follows_rows_and_metric(monkeypatch):
    monkeypatch.setattr(searched, "FEW", 100)
    model = PatchCore(coreset_ratio=1.0).fit([clustered(1, 12)])
    before = model.patch_scores(clustered(1, 5, seed=1))
    kept = model._prepared
    model.patch_scores(clustered(1, 5, seed=1))
    assert model._prepared is kept
    assert copy.deepcopy(model)._prepared is None
    model.metric = "euclidean"
    torch.testing.assert_close(model.patch_scores(clustered(1, 5, seed=1)), before.sqrt())
    assert model._prepared[2].metric == "euclidean"
    model.bank.add_(1)
    assert (model.patch_scores(clustered(1, 5, seed=1)) > before.sqrt() + 0.1).any()
    model.fit([clustered(1, 12, seed=2)])
    assert model._prepared is None


@needs_codes
@pytest.mark.parametrize(
    "model", [PatchCore(coreset_ratio=1.0), MemoryBank(), MemoryBank(metric="euclidean")]
)
def test_fit_and_score_under_inference_mode(model):
    plain = copy.deepcopy(model).fit([clustered(4, 36)])
    with torch.inference_mode():
        model.fit([clustered(4, 36)])
        assert model.bank.is_inference()
        found = model.patch_scores(clustered(1, 5, seed=1))
        kept = model._prepared
        assert kept[2] is not None
        model.patch_scores(clustered(1, 5, seed=1))
        assert model._prepared is kept
    assert torch.equal(found, plain.patch_scores(clustered(1, 5, seed=1)))


@needs_codes
@pytest.mark.parametrize("d", [768, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_banks_with_a_few_large_channels_are_prepared(d, dtype, caplog):
    tensor = torch.randn(1, 64, 64, d, generator=torch.Generator().manual_seed(0))
    tensor[..., [3, 99, 500]] *= 60
    model = MemoryBank().fit([Features(tensor.to(dtype), None, (64, 64))])
    norm = model.bank.double().norm(dim=1)
    assert (norm - 1).abs().max() < 2e-7
    query = Features(torch.randn(1, 2, 2, d), None, (8, 8))
    model.patch_scores(query)
    assert model._prepared[2] is not None
    assert not caplog.records


@needs_codes
def test_rows_that_no_bank_takes_are_searched_and_named_once(monkeypatch, caplog):
    monkeypatch.setattr(searched, "FEW", 100)
    monkeypatch.setattr(memory_bank, "FEW", 100)
    model = MemoryBank().fit([clustered(1, 12)])
    model.load_state({"bank": model.bank * 1.001})
    want = model.patch_scores(clustered(1, 5, seed=1))
    kept = model._prepared
    assert torch.equal(model.patch_scores(clustered(1, 5, seed=1)), want)
    assert model._prepared is kept
    assert kept[2] is None
    [record] = caplog.records
    assert "memory_bank is searched without a prepared bank, slower: Bank: the norm of row 0 is +0.001" in (
        record.getMessage()
    )
    model.load_state({"bank": model.bank / 1.001})
    torch.testing.assert_close(model.patch_scores(clustered(1, 5, seed=1)), want)


@pytest.mark.parametrize("name", [n for n in models.names() if models.create(n).merges])
def test_models_that_merge_learn_batch_by_batch(name):
    batches = [clustered(2, 8, seed=i) for i in range(3)]
    whole, grown, query = models.create(name).fit(batches), models.create(name), clustered(2, 8, seed=9)
    assert grown.partial_fit(batches[0]) is grown
    first = grown.state()
    with pytest.raises(InputError, match="NaN or infinite"):
        grown.partial_fit(Features(torch.full((1, 8, 8, 24), torch.nan), None, (32, 32)))
    assert all(grown.state()[n] is t for n, t in first.items())
    grown.partial_fit(batches[1]).partial_fit(batches[2])
    for n, tensor in whole.state().items():
        assert torch.equal(grown.state()[n], tensor), n
    torch.testing.assert_close(grown.score(query).score, whole.score(query).score)


@pytest.mark.parametrize("name", ["patchcore", "spatial_ar", "zero_shot"])
def test_models_that_learn_all_at_once_say_so(name):
    model = models.create(name)
    with pytest.raises(InputError, match=f"a {name} cannot learn more images later; fit it on all"):
        model.partial_fit(clustered(1, 8))
    assert not model.is_fitted


def test_what_a_model_wants_follows_its_parameters():
    wanted = {name: models.create(name).wants_cls for name in models.names()}
    assert {name for name, wants in wanted.items() if wants} == {"support_kmeans", "zero_shot"}
    assert not models.create("support_kmeans", match_descriptor="mean_patch").wants_cls
    assert models.create("zero_shot", image_score="max").wants_cls
