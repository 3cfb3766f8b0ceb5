"""anomalib's own models, patched and unpatched, on the same seeds: the same coreset, scores and maps."""

import numpy as np
import pytest
import torch

from dinofast.drop_in import anomalib as ours

pytestmark = pytest.mark.filterwarnings("ignore")


def images(n, seed=0, size=(64, 64)):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def patchcore():
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    torch.manual_seed(0)
    return PatchcoreModel(["layer1", "layer2"], "resnet18", pre_trained=False, num_neighbors=4).eval()


@pytest.fixture(scope="module")
def dino():
    """Make one model without weights; its options are attributes."""
    from anomalib.models.image.anomaly_dino import torch_model

    real = torch_model.TimmFeatureExtractor
    without_weights = lambda **options: real(**options | {"pre_trained": False})  # noqa: E731
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_model, "TimmFeatureExtractor", without_weights)
        return torch_model.AnomalyDINOModel(encoder_name="vit_small_patch14_dinov2").eval()


def fitted(model, store, ratio=None):
    model.train()
    model.memory_bank = torch.empty(0)
    model.embedding_store.clear()
    for batch in store:
        model(batch)
    model.eval()
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 - of the host's random projection
    model.subsample_embedding(ratio) if ratio else model.fit()


def both(run):
    """Run plain, then patched."""
    plain = run()
    with ours.patched():
        return plain, run()


@pytest.mark.parametrize("neighbors", [1, 4])
@pytest.mark.parametrize("n", [2, 6])
def test_patchcore_gives_the_same_coreset_scores_and_maps(patchcore, neighbors, n):
    patchcore.num_neighbors = neighbors

    def run():
        fitted(patchcore, [images(n, seed) for seed in range(3)], ratio=0.1)
        result = patchcore(images(3, seed=9))
        return patchcore.memory_bank.clone(), result.pred_score, result.anomaly_map

    plain, found = both(run)
    assert torch.equal(found[0], plain[0])
    for mine, theirs in zip(found[1:], plain[1:], strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_neighbours": 3}, {"coreset_subsampling": True}])
@pytest.mark.parametrize("size", [(70, 84), (75, 90)])
def test_anomaly_dino_gives_the_same_scores_and_maps(dino, monkeypatch, options, size):
    model = dino
    for name, value in options.items():
        assert isinstance(getattr(model, name), type(value))
        monkeypatch.setattr(model, name, value)

    def run():
        fitted(model, [images(2, seed, size) for seed in range(2)])
        result = model(images(2, 9, size))
        return model.memory_bank.clone(), result.pred_score, result.anomaly_map

    plain, found = both(run)
    assert torch.equal(found[0], plain[0])
    for mine, theirs in zip(found[1:], plain[1:], strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_large_bank_is_prepared_once_and_anew_when_it_changes(patchcore, monkeypatch):
    built = []
    real = ours.Bank
    monkeypatch.setattr(ours, "Bank", lambda rows, metric: built.append(metric) or real(rows, metric))
    patchcore.memory_bank = torch.randn(ours.FEW + 5, 192)
    queries = torch.randn(50, 192)
    for _ in range(2):
        plain, found = both(lambda: patchcore.nearest_neighbors(queries, 3))
        torch.testing.assert_close(found[0], plain[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(found[1], plain[1])
    assert built == ["euclidean"]
    patchcore.memory_bank[0] = queries[0]
    plain, found = both(lambda: patchcore.nearest_neighbors(queries, 1))
    assert found[1][0] == 0
    assert len(built) == 2


def test_leaving_the_block_brings_anomalib_back():
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    before = PatchcoreModel.nearest_neighbors
    with pytest.raises(KeyError), ours.patched():
        {}[PatchcoreModel.nearest_neighbors is before]
    with ours.patched():
        assert PatchcoreModel.nearest_neighbors is not before
    assert PatchcoreModel.nearest_neighbors is before
