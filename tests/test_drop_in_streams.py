"""Drop-ins given CuPy's arrays compute on CuPy's stream, and give CuPy's arrays; a stand-in, no GPU."""

import numpy as np
import pytest
import torch
from cupy_stand_in import CupyArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinofast.drop_in import (
    anomalydino,
    anomalydino_dpmm,
    faiss,
    fastkmeans,
    flash_kmeans,
    patchcore,
    sklearn,
)
from dinofast.interop import on_callers_stream, on_stream_of

ROWS = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


class Rows(CupyArray):
    """CuPy's rows, which scikit-learn's names tell by the protocol of CUDA arrays."""

    __module__ = "cupy"
    ndim = 2
    __cuda_array_interface__ = None  # there is DLPack

    def __getitem__(self, part):
        return Rows(self.tensor[part])

    def mean(self, axis):
        return Rows(self.tensor.mean(axis))


class Streams(TorchDispatchMode):
    """Remembers on which stream torch is at each operation that reads memory."""

    def __init__(self, state):
        super().__init__()
        self.state, self.seen = state, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and any(isinstance(x, torch.Tensor) and x.numel() for x in tree_leaves(args)):
            self.seen.add(self.state.current.cuda_stream)
        return func(*args, **(kwargs or {}))


def dpmm(rows):
    torch.manual_seed(0)
    model = anomalydino_dpmm.DPMM(3, 6)
    model.initialize(rows)
    model.step(rows)
    model.m_step(rows, model.e_step(rows))
    scores = model.sample_score(rows), model.get_log_prob(rows), model.get_responsibilities(rows)
    return *scores, model.distance_to_nearest_cluster(rows)


def flat(rows):
    index = faiss.IndexFlatL2(6)
    index.add(rows)
    mapped = faiss.IndexIDMap(faiss.IndexFlatIP(6))
    mapped.add_with_ids(rows, np.arange(len(ROWS)) + 5)
    searched = *index.search(rows, 3), *index.range_search(rows, 2.0)[1:], index.assign(rows)
    return *searched, *mapped.search(rows, 2), *mapped.range_search(rows, 1.0)[1:], *faiss.knn(rows, rows, 2)


def faiss_kmeans(rows):
    kmeans = faiss.Kmeans(6, 3, niter=3)
    kmeans.train(rows)
    return kmeans.assign(rows)


def coreset(rows):
    search = patchcore.FaissNN()
    search.fit(rows)
    samplers = patchcore.RandomSampler(0.2, seed=0), patchcore.GreedyCoresetSampler(0.2, seed=0)
    return *search.run(2, rows), *(sampler.run(rows) for sampler in samplers)


def neighbors(rows):
    model = sklearn.NearestNeighbors(n_neighbors=2).fit(rows)
    radius = model.radius_neighbors(rows, 1.0)[0], model.radius_neighbors(None, 1.0)[0]
    return *model.kneighbors(rows), *model.kneighbors(), *(x for found in radius for x in found)


def mixture(rows):
    model = sklearn.BayesianGaussianMixture(n_components=2, tol=1e9, init_params="random", random_state=0)
    model.fit(rows)
    return model.score_samples(rows), model.predict(rows), model.predict_proba(rows)


def kmeans(rows):
    model = sklearn.KMeans(3, init=ROWS[:3].numpy(), random_state=0).fit(rows)
    return model.predict(rows), model.transform(rows), model.labels_


CASES = {
    "AnomalyDINO": lambda x: (
        anomalydino.Search(x, k_neighbors=2)(x),
        anomalydino.dists2map(x, (12, 12)),
    ),
    "anomalydino-dpmm": dpmm,
    "faiss": flat,
    "faiss.Kmeans": faiss_kmeans,
    "fastkmeans": lambda x: (fastkmeans.FastKMeans(6, 3).fit_predict(x),),
    "flash-kmeans": lambda x: flash_kmeans.batch_kmeans_Euclid(
        type(x)(ROWS[None]) if isinstance(x, Rows) else x[None], 3, 4
    )[:2],
    "patchcore": coreset,
    "KMeans": kmeans,
    "NearestNeighbors": neighbors,
    "BayesianGaussianMixture": mixture,
}


@pytest.mark.parametrize("name", CASES)
def test_cupys_rows_are_computed_on_cupys_stream(gpu, name):
    expected = CASES[name](ROWS.clone())
    rows = Rows(ROWS.clone())
    gpu.cupy = 32
    with Streams(gpu) as streams:
        found = CASES[name](rows)
    assert streams.seen == {32}, "some of it was computed on torch's stream"
    assert gpu.current.cuda_stream == 16
    assert gpu.log[0] == "32 waits for 16"
    assert gpu.log[-1] == "16 waits for 32"
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert isinstance(ours, CupyArray), type(ours)
        torch.testing.assert_close(ours.tensor, torch.as_tensor(theirs))


def test_arrays_in_lists_and_mappings(gpu):
    sets = [ROWS[:20], ROWS[20:]]
    layers = patchcore.NearestNeighbourScorer(2)
    layers.fit([ROWS.numpy()])
    model = anomalydino_dpmm.DPMM(3, 6)
    model.initialize(ROWS)
    state = {k: Rows(x) if isinstance(x, torch.Tensor) else x for k, x in model.state_dict().items()}
    expected = (
        anomalydino.calculate_cosine_distances(sets, 0, quantile=0.2),
        anomalydino.mean_top1p(ROWS),
        layers.predict([ROWS])[0],
    )
    gpu.cupy = 32
    with Streams(gpu) as streams:
        found = (
            anomalydino.calculate_cosine_distances([Rows(x) for x in sets], 0, quantile=0.2),
            anomalydino.mean_top1p(Rows(ROWS)),
            layers.predict([Rows(ROWS)])[0],
        )
        model.load_state_dict(state)
    assert streams.seen == {32}
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs)


def test_what_is_wrapped_keeps_its_name_and_its_signature(gpu):
    gpu.cupy, seen = 32, []

    @on_callers_stream
    class Host:
        """Words."""

        def __init__(self, rows=None):
            self.note(rows)

        def note(self, rows):
            """More words."""
            seen.append(gpu.current.cuda_stream)

        def _own(self):
            seen.append("own")

    Host(CupyArray(torch.ones(1))).note([1, CupyArray(torch.ones(1))])
    Host().note({"rows": CupyArray(torch.ones(1))})
    assert seen == [32, 32, 16, 32]
    assert Host.note.__doc__ == "More words."
    assert not hasattr(Host._own, "__wrapped__")
    with on_stream_of(CupyArray(torch.ones(1))):
        Host(torch.ones(1))
    assert seen[-1] == 32, "it stays on the stream that the caller chose"
    assert "n_clusters" in sklearn.KMeans().get_params()
