"""Leaving runs out, with models that merge and with those that are fitted anew; and epochs in a Detector."""

import pytest
import torch
from textures import weave

from dinofast import Detector, data
from dinofast.cross_fit import models_of_the_others, n_passes, runs_of_neighbors
from dinofast.errors import InputError
from dinofast.models.iterative import IterativeModel
from dinofast.models.memory_bank import MemoryBank
from dinofast.models.support_kmeans import SupportKMeans
from dinofast.types import Scores

IMAGES = data.samples([weave(i) for i in range(5)])


class Mean(IterativeModel):
    """Distance to the mean of all patches; says what it was given."""

    name = "mean"

    @property
    def n_channels(self):
        return self.state()["mean"].shape[0]

    def _train(self, train, validation, checkpoint, progress):
        progress("epochs", 1, 1)
        checkpoint.save({"mean": torch.zeros(1)}, {})
        held = 0 if validation is None else len(validation)
        return {"mean": train.rows(range(len(train))).mean(0), "held_back": torch.tensor(held)}

    def _check_state(self, state): ...

    def _patch_scores(self, features):
        return (features.tensor - self.state()["mean"]).norm(dim=3)

    def _summarize(self, patches, image_size):
        return Scores(patches.amax((1, 2)), patches.new_zeros(len(patches), *image_size))


@pytest.mark.parametrize("kind", [MemoryBank, Mean])
def test_each_run_is_left_out_of_its_model(lite0, kind):
    embedder = Detector(lite0)._embedder
    read = []

    def features(run):
        read.extend(run)
        return [batch.features for batch in embedder.batches(run, "fit")]

    runs = runs_of_neighbors(IMAGES, 3)
    assert [len(run) for run in runs] == [2, 2, 1]
    found = list(models_of_the_others(kind(), runs, features))
    assert [run for run, _ in found] == runs
    assert len(read) == (n_passes(kind(), 3) - 1) * len(IMAGES)
    for i, (_, model) in enumerate(found):
        expected = kind().fit(features([s for j, run in enumerate(runs) if j != i for s in run]))
        [query] = features(IMAGES[:1])
        torch.testing.assert_close(model.score(query).score, expected.score(query).score)


def test_a_run_too_short_for_a_model_of_its_own(lite0):
    model = SupportKMeans(n_support=3, match_descriptor="mean_patch", foreground="none")
    images = data.samples([weave(i) for i in range(6)])
    told = []
    detector = Detector(lite0, model).fit(images)
    threshold = detector.calibrate(images, cross_fit=3, fpr=0.2, progress=lambda *now: told.append(now))
    assert threshold.n_images == 6
    assert all(done <= total for _, done, total in told)
    hungry = SupportKMeans(n_support=5, match_descriptor="mean_patch", foreground="none")
    detector = Detector(lite0, hungry).fit(images)
    with pytest.raises(InputError, match="n_support=5 needs as many normal images, 4 are left"):
        detector.calibrate(images, cross_fit=3, fpr=0.1)


def test_detector_calibrates_a_model_that_does_not_merge(lite0):
    told = []
    detector = Detector(lite0, Mean()).fit(IMAGES)
    threshold = detector.calibrate(IMAGES, cross_fit=3, fpr=0.1, progress=lambda *now: told.append(now))
    assert threshold.n_images == 5
    counted = [(done, total) for stage, done, total in told if stage == "calibrate"]
    assert counted[-1] == (15, 15)
    assert counted == sorted(counted)


def test_detector_hands_on_validation_checkpoint_and_progress(lite0, tmp_path):
    told = []
    detector = Detector(lite0, Mean()).fit(
        IMAGES[:3],
        validation=IMAGES[3:],
        checkpoint=tmp_path / "run",
        progress=lambda *now: told.append(now),
    )
    assert detector.model.state()["held_back"] == 2
    assert (tmp_path / "run").exists()
    assert ("epochs", 1, 1) in told
    assert detector.n_images == 3


def test_validation_is_refused_by_a_model_without_epochs(lite0, tmp_path):
    for options in ({"validation": IMAGES[3:]}, {"checkpoint": tmp_path / "run"}):
        with pytest.raises(InputError, match="for models trained over epochs; memory_bank is not one"):
            Detector(lite0).fit(IMAGES[:3], **options)
