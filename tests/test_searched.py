"""Models that search rows: prepared or not, the same bits; and learning on, for models that merge."""

import copy

import pytest
import torch

from dinofast import models
from dinofast.errors import InputError
from dinofast.models import searched
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
