"""The BMAD protocol from files on disk to the report, each figure against its definition."""

from __future__ import annotations

import json
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bmad_trees import LAYOUTS, bmad_tree, read
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score
from textures import save, spoiled

from dinofast import Detector, models, protocol, scoreboard, trial
from dinofast.backbone import Backbone
from dinofast.data import Sample, bmad
from dinofast.data.split import SplitSet
from dinofast.errors import BadFilesError, InputError
from dinofast.metrics import RegionOverlap
from dinofast.models.iterative import IterativeModel
from dinofast.scoreboard import Report
from dinofast.stream import Embedder
from dinofast.types import Features, Scores


def truth(sample: Sample) -> np.ndarray:
    mask = sample.mask()
    assert mask is not None
    return mask


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_runs_end_to_end(layout: str, lite0: Backbone, tmp_path: Path) -> None:
    bmad_tree(tmp_path, layout, good_masks=layout.endswith("L1"))
    found = protocol.run(Detector(lite0), bmad.load(tmp_path))
    assert found.set == layout.split("-")[0]
    assert (found.n_train, len(found.images)) == (3, 5)
    assert found.pixel.auroc > 0.95
    assert found.pro is not None
    assert found.pro.value > 0.9
    assert [at.threshold.n_images for at in found.dice] == [3, 3, 3]
    assert found.image is not None
    assert found.image.auroc == 1
    assert all(note.startswith("the counts differ from ") for note in found.notes)
    json.dumps(found.to_dict(), allow_nan=False)


def test_figures_are_their_definitions(brain: Path, report: Report, lite0: Backbone) -> None:
    found = bmad.load(brain)
    detector = Detector(lite0).fit(found.train)
    normal = [s for s in found.valid if s.label == 0]
    calibration = np.sort(np.concatenate([p.map.numpy().ravel() for p in detector.predict(normal)]))
    predictions = list(detector.predict(found.test))
    maps, masks = [p.map.numpy() for p in predictions], [truth(s) for s in found.test]
    scores, labels = (np.concatenate([a.ravel() for a in arrays]) for arrays in (maps, masks))

    precision, recall, _ = precision_recall_curve(labels, scores)
    assert report.pixel.auroc == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert report.pixel.aupr == pytest.approx(auc(recall, precision), abs=1e-6)
    assert report.pixel.average_precision == pytest.approx(average_precision_score(labels, scores), abs=1e-6)
    assert (report.pixel.n_anomalous, report.pixel.error) == (labels.sum(), 0)

    assert [at.fpr for at in report.dice] == [0.1, 0.05, 0.01]
    for at in report.dice:
        threshold = calibration[calibration.size - 1 - int(calibration.size * at.fpr)]
        assert at.threshold.value == pytest.approx(threshold, rel=1e-5)
        called = scores > at.threshold.value
        assert at.dice == pytest.approx(2 * (called & labels).sum() / (called.sum() + labels.sum()), abs=1e-3)
        assert at.test_fpr == pytest.approx(called[~labels].mean(), abs=1e-3)
        assert at.threshold.realized_rate <= at.fpr

    regions = RegionOverlap()
    for map, mask in zip(maps, masks, strict=True):
        regions.update(map, mask)
    assert report.pro is not None
    assert report.pro.value == pytest.approx(regions.area().value, abs=1e-4)

    for row, sample, prediction, mask in zip(report.images, found.test, predictions, masks, strict=True):
        assert sample.source == str(brain / row.source)
        assert row.label == sample.label
        assert row.score == pytest.approx(prediction.score, abs=1e-5)
        if row.label:
            assert row.auroc == pytest.approx(roc_auc_score(mask.ravel(), prediction.map.ravel()), abs=1e-5)
        else:
            assert (row.auroc, row.aupr) == (None, None)
    assert report.image_wise is not None
    pairs = [(row.auroc, row.aupr) for row in report.images if row.auroc is not None]
    assert (report.image_wise["auroc"], report.image_wise["aupr"]) == pytest.approx(np.mean(pairs, axis=0))
    assert report.image_wise["n_images"] == 3
    assert report.model_bytes == 3 * 36 * lite0.dim * 4
    assert set(report.seconds) == set(report.fit_seconds) == {"read", "preprocess", "backbone", "model"}


def test_thresholds_from_patch_scores(brain: Path, lite0: Backbone) -> None:
    found = bmad.load(brain)
    detector = Detector(lite0).fit(found.train)
    by_patch = protocol.run(detector, found, threshold_from="patch", regions=False)
    batches = Embedder(lite0).batches([s for s in found.valid if s.label == 0], "x")
    patches = np.sort(np.concatenate([detector.model.patch_scores(b.features).ravel() for b in batches]))
    assert patches.size == 3 * 36
    for at in by_patch.dice:
        assert at.threshold.value == pytest.approx(patches[107 - int(108 * at.fpr)], rel=1e-5)
    assert by_patch.pro is None
    assert by_patch.settings["threshold_from"] == "patch"
    assert by_patch.fit_seconds == {}


@pytest.mark.parametrize(("source", "n_maps", "n_patches"), [("pixel", 8, 0), ("patch", 5, 3)])
def test_every_image_is_scored_once(
    brain: Path, lite0: Backbone, monkeypatch: pytest.MonkeyPatch, source: str, n_maps: int, n_patches: int
) -> None:
    detector = Detector(lite0).fit(bmad.load(brain).train)
    model, counts = type(detector.model), {"score": 0, "patch_scores": 0}
    plain = {name: getattr(model, name) for name in counts}
    for name in counts:

        def counted(self: Any, features: Any, name: str = name) -> Any:
            counts[name] += len(features)
            return plain[name](self, features)

        monkeypatch.setattr(model, name, counted)
    protocol.run(detector, bmad.load(brain), threshold_from=source, regions=False)
    assert counts == {"score": n_maps, "patch_scores": n_patches}


def test_masks_at_240_are_nearest_pixels(brain: Path, lite0: Backbone) -> None:
    found = protocol.run(Detector(lite0), bmad.load(brain), map_size="240", regions=False)
    near = (np.arange(240) + 0.5) * 60 // 240
    masks = [truth(s)[np.ix_(near.astype(int), near.astype(int))] for s in bmad.load(brain).test]
    assert found.pixel.n_anomalous == sum(m.sum() for m in masks)
    assert found.pixel.n_normal + found.pixel.n_anomalous == 5 * 240 * 240
    assert found.pixel.auroc > 0.95


def test_masks_at_224_are_bilinear_from_a_tenth(brain: Path, lite0: Backbone) -> None:
    found = protocol.run(Detector(lite0), bmad.load(brain), map_size="224", regions=False)
    masks = torch.stack([torch.from_numpy(truth(s)) for s in bmad.load(brain).test])[None].double()
    soft = torch.nn.functional.interpolate(masks, (224, 224), mode="bilinear")
    assert abs(found.pixel.n_anomalous - int((soft >= 0.1).sum())) <= 5
    assert found.pixel.n_anomalous > int((soft >= 0.5).sum()) + 100


def test_the_mask_rule_decides(brain: Path, report: Report, lite0: Backbone) -> None:
    top = protocol.run(Detector(lite0), bmad.load(brain, mask_rule="255"))
    assert 0 < top.pixel.n_anomalous < report.pixel.n_anomalous
    assert top.settings["mask_rule"] == "255"


def test_notes_say_what_surprises(lite0: Backbone, tmp_path: Path) -> None:
    root = bmad_tree(tmp_path, "liver-L1")
    mask = root / "test/label/Ungood/00011_60.png"
    save(mask, 0 * read(mask))
    save(root / "test/label/good/00009_60.png", np.full((64, 64), 255, np.uint8))
    save(root / "test/img/Ungood/again.png", read(root / "valid/img/Ungood/00007_60.png"))
    save(root / "test/label/Ungood/again.png", read(root / "valid/label/Ungood/00007_60.png"))
    save(root / "test/label/Ungood/lone.png", read(mask))
    found = protocol.run(Detector(lite0), bmad.load(root))
    assert found.notes[1:] == [
        f"valid & test share 1 images, {root / 'valid/img/Ungood/00007_60.png'} and "
        f"{root / 'test/img/Ungood/again.png'} among them",
        "1 test images of label 1 have an empty mask by the rule 'any'",
        "1 test images of label 0 have a mask that marks something",
        "1 masks have no image, test/label/Ungood/lone.png among them",
    ]
    assert list(found.overlap) == ["valid & test"]


def test_a_detector_that_has_seen_the_test_is_told(brain: Path, lite0: Backbone) -> None:
    found = bmad.load(brain)
    detector = Detector(lite0).fit([*found.train, found.test[1], found.valid[0]])
    notes = protocol.run(detector, found, regions=False).notes
    assert notes[1:] == [
        f"the detector has learned 1 images of valid, {found.valid[0].source} among them",
        f"the detector has learned 1 images of test, {found.test[1].source} among them",
    ]


class Chooser(IterativeModel):
    """A toy that learns the mean of train and of validation, the latter as what it would choose epochs by."""

    name = "chooser"

    def _train(self, train: Any, validation: Any, checkpoint: Any, progress: Any) -> dict[str, torch.Tensor]:
        return {"mean": torch.stack([s.rows(range(len(s))).mean(0) for s in (train, validation)])}

    @property
    def n_channels(self) -> int:
        return self.state()["mean"].shape[1]

    def _merged(self, other: Any) -> Any: ...

    def _check_state(self, state: Any) -> None: ...

    def _patch_scores(self, features: Features) -> torch.Tensor:
        return (features.tensor - self.state()["mean"][0]).norm(dim=3)

    def _summarize(self, patches: torch.Tensor, image_size: tuple[int, int]) -> Scores:
        maps = torch.nn.functional.interpolate(patches[:, None], image_size, mode="bilinear")[:, 0]
        return Scores(patches.amax((1, 2)), maps)


def test_a_model_of_epochs_chooses_by_normal_validation_images(brain: Path, lite0: Backbone) -> None:
    found = bmad.load(brain)
    detector = Detector(lite0, Chooser())
    report = protocol.run(detector, found, regions=False)
    assert (report.model, report.n_train) == ("Chooser()", 3)
    assert not any(row["same_model"] for row in report.published)
    normal = [s for s in found.valid if s.label == 0]
    batches = Embedder(lite0).batches(normal, "x")
    mean = torch.cat([b.features.tensor.flatten(0, 2) for b in batches]).mean(0)
    torch.testing.assert_close(detector.model.state()["mean"][1], mean, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="validation and checkpoint are for models trained over epochs"):
        protocol.run(Detector(lite0), found, checkpoint=brain / "never", regions=False)


class Sleeper(Chooser):
    """Takes its time to train."""

    def _train(self, *args: Any) -> dict[str, torch.Tensor]:
        time.sleep(1)
        return super()._train(*args)


def test_the_time_of_validation_images_counts_for_the_fit(brain: Path, lite0: Backbone) -> None:
    found = bmad.load(brain)
    report = protocol.run(Detector(lite0, Sleeper()), found, regions=False)
    assert report.fit_seconds["model"] * len(found.train) > 0.999
    images = SplitSet("set", "", "", "", found.train, found.valid, found.test)
    trained = trial.run(Detector(lite0, Sleeper()), images)
    assert trained.fit_model_seconds is not None
    assert trained.fit_model_seconds > 0.999


def test_counts_that_agree_are_said(lite0: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = bmad.load(bmad_tree(tmp_path, "resc-L1"))
    monkeypatch.setitem(bmad.PUBLISHED_COUNTS["resc"], "DPMM", found.counts)
    assert protocol.run(Detector(lite0), found).notes == ["the counts are those of DPMM"]
    unnamed = bmad.load(bmad_tree(tmp_path / "x", "resc-L1").rename(tmp_path / "data"))
    said = protocol.run(Detector(lite0), unnamed)
    assert (said.set, said.published) == (None, [])
    assert said.notes[0].startswith("the set is not known")


def test_no_split_is_held(lite0: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of what numpy holds is the same for 3 times as many pixels."""
    size = (192, 384)
    image, mask = spoiled(0, size), np.zeros(size, bool)
    mask[128:, 256:] = True
    monkeypatch.setattr(protocol, "_BUDGET", 2**18)
    monkeypatch.setattr(protocol, "_BINS", 2**12)
    monkeypatch.setattr("dinofast.evaluate._GATHERED", 2**18)
    detector = Detector(lite0).fit([image])

    def peak(count: int) -> int:
        path = Path("/set/test.png")
        samples = [Sample(str(i), lambda: image, lambda: mask, 1, path) for i in range(count)]
        scorer = protocol._Scorer(detector, "native", 4, None)
        tracemalloc.start()
        thresholds = scorer.thresholds(samples[:4], "pixel")
        scorer.figures(Path("/set"), samples, thresholds, True)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(6), peak(18)
    assert many - few < 2 * mask.size  # 12 maps more, if held, would be 30 times this
    assert many < 64 * 2**20


def test_bad_files_stop_the_run_before_the_fit(lite0: Backbone, tmp_path: Path) -> None:
    root = bmad_tree(tmp_path)
    mask = root / "test/Ungood/label/00011_60.png"
    save(mask, read(mask)[1:])
    (root / "valid/good/img/00004_60.png").write_text("no picture")
    detector = Detector(lite0)
    with pytest.raises(BadFilesError, match=r"00004_60\.png: not an image"):
        protocol.run(detector, bmad.load(root))
    (root / "valid/good/img/00004_60.png").unlink()
    with pytest.raises(BadFilesError, match=r"00011_60\.png.*its size \(H, W\) = \(59, 60\)"):
        protocol.run(detector, bmad.load(root))
    assert not detector.model.is_fitted
    found = protocol.run(detector, bmad.load(root), skip_bad=True)
    assert [row.source for row in found.images if row.label] == [
        "test/Ungood/img/00012_61.png",
        "test/Ungood/img/00013_62.png",
    ]


def test_masks_that_mark_nothing_are_refused(lite0: Backbone, tmp_path: Path) -> None:
    root = bmad_tree(tmp_path, "liver-L1")
    for path in (root / "test/label/Ungood").iterdir():
        save(path, np.minimum(read(path), 1))
    with pytest.raises(
        InputError, match="no mask of test marks a pixel by the mask rule '255'; choose another"
    ):
        protocol.run(Detector(lite0), bmad.load(root, mask_rule="255"))
    assert protocol.run(Detector(lite0), bmad.load(root)).pixel.auroc > 0.95


def test_labels_from_masks_can_leave_no_normal_image(lite0: Backbone, tmp_path: Path) -> None:
    root = bmad_tree(tmp_path, "liver-L1")
    for path in (root / "valid/label/good").iterdir():
        save(path, np.full((64, 64), 255, np.uint8))
    with pytest.raises(
        InputError, match="valid has no image of label 0; the thresholds are taken from these"
    ):
        protocol.run(Detector(lite0), bmad.load(root, labels="mask"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"map_size": "100"}, "map size '100': one of native, 240, 224"),
        ({"threshold_from": "image"}, "thresholds from 'image': one of pixel, patch"),
    ],
)
def test_options_that_cannot_be(brain: Path, lite0: Backbone, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        protocol.run(Detector(lite0), bmad.load(brain), **options)


def test_without_scipy_the_run_says_so_first(
    brain: Path, lite0: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    detector = Detector(lite0)
    with pytest.raises(InputError, match="needs scipy"):
        protocol.run(detector, bmad.load(brain))
    assert not detector.model.is_fitted
    assert protocol.run(detector, bmad.load(brain), regions=False).pro is None


SMALL: dict[str, dict[str, Any]] = {
    "dpmm": {"n_components": 2},
    "memory_bank": {},
    "patchcore": {},
    "spatial_ar": {"hidden": 4, "n_layers": 2, "dilations": 1, "n_epochs": 1},
    "support_kmeans": {"match_descriptor": "mean_patch"},
}


def test_every_model_is_asked_for() -> None:
    """The zero-shot model compares patches with sentences, which only a backbone with text has."""
    assert [*SMALL, "zero_shot"] == models.names()


@pytest.mark.parametrize("name", SMALL)
def test_every_model_can_be_asked_for(name: str, brain: Path, lite0: Backbone) -> None:
    found = bmad.load(brain)
    detector = Detector(lite0, models.create(name, **SMALL[name]))
    report = protocol.run(detector, found, train=found.train[:2], regions=False)
    assert report.n_train == 2
    assert scoreboard.tables(report)[0].rows[0][0] == "this run"
