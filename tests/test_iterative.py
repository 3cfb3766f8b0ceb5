"""Features stored on disk, and training runs that go on where they were killed."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from dinofast.errors import ArtifactError, InputError
from dinofast.models.feature_store import FeatureStore, _distinct
from dinofast.models.iterative import IterativeModel
from dinofast.models.spatial_ar import SpatialAR
from dinofast.types import Features, Scores


def features(b=5, h=3, w=4, d=6, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return Features(torch.randn(b, h, w, d, generator=draw).to(dtype), None, (24, 32))


class Walk(IterativeModel):
    """A toy: a mean that every batch pulls on, so that each step depends on all before it."""

    name = "walk"

    def __init__(self, n_epochs=4, die_at=None, seed=0):
        super().__init__()
        self.n_epochs, self.die_at, self.seed = n_epochs, die_at, seed

    def config(self):
        return {"model": self.name, "params": {"n_epochs": self.n_epochs, "seed": self.seed}}

    @property
    def n_channels(self):
        return self.state()["mean"].shape[0]

    def _train(self, train, validation, checkpoint, progress):
        found = checkpoint.load()
        state, position = found or ({"mean": torch.zeros(train.n_channels)}, {"epoch": 0})
        for epoch in range(position["epoch"], self.n_epochs):
            for i, images in enumerate(train.batches(2, self.seed + epoch)):
                if (epoch, i) == self.die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                state = {"mean": 0.7 * state["mean"] + train.rows(images).mean(0)}
            checkpoint.save(state, {"epoch": epoch + 1})
            progress("fit", epoch + 1, self.n_epochs)
        return state

    def _check_state(self, state): ...

    def _patch_scores(self, features):
        return features.tensor.sum(3)

    def _summarize(self, patches, image_size):
        return Scores(patches.amax((1, 2)), patches)


def test_store_gives_back_what_it_was_given_in_any_order():
    first, second = features(2), features(3, h=5, w=2, seed=1, dtype=torch.float16)
    with FeatureStore.of([first, second]) as store:
        assert len(store) == 5
        assert store.n_rows == 2 * 12 + 3 * 10
        expected = torch.cat([second.tensor[1].flatten(0, 1).float(), first.tensor[0].flatten(0, 1)])
        assert torch.equal(store.rows([3, 0]), expected)
        assert torch.equal(store.images([4, 2]), second.tensor[[2, 0]].float())
        assert store.grids == [(3, 4)] * 2 + [(5, 2)] * 3


def test_store_samples_distinct_rows_by_seed():
    with FeatureStore.of([features(4)]) as store:
        drawn = store.sample(20, seed=3)
        every = {tuple(row) for row in store.rows(range(4)).tolist()}
        assert len({tuple(row) for row in drawn.tolist()} & every) == 20
        assert torch.equal(drawn, store.sample(20, seed=3))
        assert not torch.equal(drawn, store.sample(20, seed=4))
        assert torch.equal(store.sample(1000, seed=3), store.rows(range(4)))


def test_store_deals_every_image_once_and_shuffles_by_seed():
    with FeatureStore.of([features(7)]) as store:
        assert list(store.batches(3)) == [[0, 1, 2], [3, 4, 5], [6]]
        dealt = [list(store.batches(3, seed)) for seed in (1, 1, 2)]
        assert dealt[0] == dealt[1] != dealt[2]
        assert sorted(i for images in dealt[0] for i in images) == list(range(7))


def test_fingerprint_tells_images_and_not_batches():
    whole = features(4)
    parts = [Features(part, None, whole.image_size) for part in whole.tensor.split([1, 3])]
    other = Features(whole.tensor.flip(0), None, whole.image_size)
    narrow = Features(whole.tensor.reshape(4, 4, 3, 6), None, whole.image_size)
    prints = []
    for batches in ([whole], parts, [other], [narrow]):
        with FeatureStore.of(batches) as store:
            prints.append(store.fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_full_temporary_folder_is_named_with_the_remedy():
    """A file may not grow beyond 1000 bytes: the first write is a partial one, the next fails."""
    code = (
        "import resource, signal, torch\n"
        "from dinofast.errors import InputError\n"
        "from dinofast.models.feature_store import FeatureStore\n"
        "from dinofast.types import Features\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    FeatureStore.of([Features(torch.ones(5, 3, 4, 6), None, (24, 32))])\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot hold the features of image 0 and on (File too large)" in done.stdout
    assert "TMPDIR" in done.stdout


def test_partial_writes_are_gone_on_with(monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, block, at: write(file, block[:7], at))
    with FeatureStore.of([features()]) as store:
        assert torch.equal(store.images(range(5)), features().tensor)


def test_validation_of_another_d_is_refused():
    with pytest.raises(InputError, match="D of the validation images is 7, of the others 6"):
        Walk().fit([features()], validation=[features(d=7)])
    with pytest.raises(InputError, match=r"pass \[features\]"):
        Walk().fit([features()], validation=features())


def test_run_killed_in_an_epoch_goes_on_to_the_same_numbers(tmp_path):
    code = (
        f"import runpy; file = runpy.run_path({__file__!r}); "
        f"file['Walk'](die_at=(2, 1)).fit([file['features']()], checkpoint={str(tmp_path / 'run')!r})"
    )
    killed = subprocess.run([sys.executable, "-c", code])
    assert killed.returncode == -signal.SIGKILL
    told = []
    resumed = Walk().fit([features()], checkpoint=tmp_path / "run", progress=lambda *a: told.append(a))
    assert told == [("fit", 3, 4), ("fit", 4, 4)]
    assert torch.equal(resumed.state()["mean"], Walk().fit([features()]).state()["mean"])


def test_checkpoint_of_another_run_is_refused(tmp_path):
    Walk().fit([features()], checkpoint=tmp_path / "run")
    for model, batch, name in ((Walk(seed=1), features(), "params"), (Walk(), features(seed=1), "features")):
        with pytest.raises(ArtifactError, match=f"checkpoint of another run .{name} differ.*delete it"):
            model.fit([batch], checkpoint=tmp_path / "run")
    (tmp_path / "run").write_bytes(b"torn")
    with pytest.raises(ArtifactError, match="torn"):
        Walk().fit([features()], checkpoint=tmp_path / "run")


def test_a_checkpoint_that_cannot_serve_is_refused_before_the_work(tmp_path):
    Walk(seed=1).fit([features()], checkpoint=tmp_path / "other")
    (tmp_path / "torn").write_bytes(b"torn")
    read = []

    def stream():
        read.append(1)
        yield features()

    for path, error, message in (
        (tmp_path, InputError, "cannot be written"),
        (tmp_path / "torn", ArtifactError, "torn"),
        (tmp_path / "other", ArtifactError, r"another run \(params differ\)"),
    ):
        with pytest.raises(error, match=message):
            Walk().fit(stream(), checkpoint=path)
    assert not read


def test_spatial_ar_refuses_a_grid_at_once():
    read = []

    def stream():
        for h in (3, 2, 3):
            read.append(h)
            yield features(h=h)

    with pytest.raises(InputError, match="the patch grid is 2 × 4, too small for a dilation of 2"):
        SpatialAR(dilations=2, n_epochs=1).fit(stream())
    assert read == [3, 2]


def test_few_numbers_of_many_take_the_memory_of_the_few():
    drawn = _distinct(1000, 10**15, torch.Generator().manual_seed(0))
    assert len(drawn.unique()) == 1000
    assert 0 <= drawn.min() < drawn.max() < 10**15
    assert torch.equal(drawn, drawn.sort().values)


def test_every_number_is_as_likely():
    draw, counts = torch.Generator().manual_seed(0), torch.zeros(9)
    for _ in range(4000):
        counts[_distinct(4, 9, draw)] += 1
    assert counts.sum() == 16000
    assert ((counts / 4000 - 4 / 9).abs() < 0.04).all()
