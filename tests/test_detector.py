from __future__ import annotations

import dataclasses
import logging
import weakref
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from textures import RGB, save, scan, spoiled, weave

from dinofast import Detector, backbone, data, models, stream
from dinofast.backbone import Backbone
from dinofast.data import Sample
from dinofast.errors import BadFilesError, InputError
from dinofast.imaging import rotations
from dinofast.types import Features

NORMAL = [weave(i) for i in range(4)]
OTHERS = [weave(i) for i in range(10, 14)]
MIXED = [(96, 96), (192, 192), (120, 100), (100, 120), (120, 100), (98, 96), (96, 96), (150, 96)]
"""Some of these become the same pixels' size, and all want maps of their own."""


def sample(image: RGB, name: str = "mine", reads: list[str] | None = None) -> Sample:
    def read() -> RGB:
        if reads is not None:
            reads.append(name)
        return image

    return Sample(name, read)


def failing_later(image: RGB, after: int) -> Sample:
    """An image that can be read `after` times, and never again."""
    left = iter([image] * after)

    def read() -> RGB:
        for found in left:
            return found
        raise InputError("vanished.png: no such file")

    return Sample("vanished.png", read)


# Maps


def test_a_foreign_patch_scores_highest(fitted: Detector) -> None:
    normal = max(p.score for p in fitted.predict(OTHERS))
    box = (slice(64, 96), slice(64, 96))
    (found,) = fitted.predict(spoiled(20, box=box))
    row, column = np.unravel_index(int(found.map.argmax()), found.map.shape)
    assert 64 <= row < 96
    assert 64 <= column < 96
    assert found.score > 1.3 * normal
    assert found.map[box].mean() > 1.5 * found.map[:48, :48].mean()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, None])
def test_predictions_do_not_depend_on_the_batch_size(fitted: Detector, batch_size: int | None) -> None:
    images = [spoiled(i, size) for i, size in enumerate(MIXED)]
    alone = [next(fitted.predict(image)) for image in images]
    together = list(fitted.predict(images, batch_size=batch_size))
    assert [p.source for p in together] == [f"array[{i}]" for i in range(len(MIXED))]
    assert [tuple(p.map.shape) for p in together] == MIXED
    for one, other in zip(alone, together, strict=True):
        assert other.map.dtype == torch.float32
        assert other.score == pytest.approx(one.score, abs=1e-5)
        torch.testing.assert_close(other.map, one.map, rtol=0, atol=1e-5)
    assert len({round(p.score, 4) for p in together}) == len(MIXED)


def test_whatever_holds_the_pixels_the_prediction_is_the_same(fitted: Detector, tmp_path: Path) -> None:
    images = np.stack([spoiled(i) for i in range(2)])
    files = [save(tmp_path / "folder" / f"{i}.png", image) for i, image in enumerate(images)]
    tensors = torch.from_numpy(images).movedim(-1, 1)
    truth = [p.map for p in fitted.predict(images)]
    for source in (
        list(images),
        tensors,
        iter(tensors),
        [Image.fromarray(image) for image in images],
        files,
        files[0].parent,
        f"{tmp_path}/**/*.png",
        [files[0], images[1]],
    ):
        maps = [p.map for p in fitted.predict(source)]
        torch.testing.assert_close(maps, truth, rtol=0, atol=0)


def test_rotations_are_learned(lite0: Backbone) -> None:
    plain, turned = Detector(lite0).fit(NORMAL[:2]), Detector(lite0).fit(NORMAL[:2], rotate=True)
    assert plain.model.state()["bank"].shape == (2 * 36, 232)
    assert turned.model.state()["bank"].shape == (2 * 8 * 36, 232)
    assert turned.n_images == 2
    tilted = rotations(OTHERS[0])[1]
    assert next(turned.predict(tilted)).score < 0.9 * next(plain.predict(tilted)).score


# Streaming


def test_images_are_read_as_they_are_consumed(fitted: Detector) -> None:
    reads: list[str] = []
    images = [sample(spoiled(i), f"{i}", reads) for i in range(9)]
    predictions = fitted.predict(images, batch_size=2)
    assert reads == []
    for i, prediction in enumerate(predictions):
        assert prediction.source == f"{i}"
        assert len(reads) <= 2 * (i // 2 + 1) + 1
    assert reads == [f"{i}" for i in range(9)]


def test_maps_that_were_consumed_are_let_go(fitted: Detector) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    most = 0
    for prediction in fitted.predict([spoiled(i) for i in range(12)], batch_size=2):
        seen.append(weakref.ref(prediction.map))
        del prediction
        most = max(most, sum(ref() is not None for ref in seen))
    assert len(seen) == 12
    assert most <= 2


def test_a_bad_image_is_raised_after_those_before_it(fitted: Detector, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    predictions = fitted.predict([*OTHERS[:3], bad, OTHERS[3]])
    found = [next(predictions).source for _ in range(3)]
    with pytest.raises(InputError, match=r"bad\.png: not an image"):
        next(predictions)
    assert found == ["array[0]", "array[1]", "array[2]"]


def test_bad_images_are_passed_over_when_asked(
    fitted: Detector, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    images = [OTHERS[0], bad, np.zeros((7, 7, 3), np.uint8), OTHERS[1], np.full((64, 64, 3), 9, np.uint8)]
    with caplog.at_level(logging.WARNING):
        found = [p.source for p in fitted.predict(images, skip_bad=True)]
    assert found == ["array[0]", "array[3]"]
    assert f"skipped {bad}: " in caplog.text
    assert len(caplog.records) == 3


def test_the_batch_size_follows_the_free_memory(fitted: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = type(fitted.backbone).forward

    def counted(self: Backbone, pixels: torch.Tensor) -> Features:
        sizes.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(type(fitted.backbone), "forward", counted)
    monkeypatch.setattr(stream, "_free_memory", lambda: 2**40)
    assert len(list(fitted.predict([weave(i) for i in range(9)]))) == 9
    assert sizes == [8, 1]
    sizes.clear()
    monkeypatch.setattr(stream, "_free_memory", lambda: 2**20)
    assert len(list(fitted.predict(OTHERS))) == 4
    assert sizes == [1, 1, 1, 1]
    sizes.clear()
    monkeypatch.setattr(stream, "_free_memory", lambda: 2**30)  # 0.25 GiB: the maps, not the pixels, fill it
    large = np.kron(weave(1), np.ones((30, 30, 1), np.uint8))
    assert len(list(fitted.predict([large, large]))) == 2
    assert sizes == [1, 1]


def test_free_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stream._free_memory() > 2**20
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert stream._free_memory() == 2**31


def test_time_is_kept_by_stage(fitted: Detector) -> None:
    assert set(fitted.seconds) == {"read", "preprocess", "backbone", "model"}
    assert all(0 < spent < 10 for spent in fitted.seconds.values())
    list(fitted.predict(OTHERS))
    assert all(0 < spent < 10 for spent in fitted.seconds.values())
    assert fitted.seconds["backbone"] > fitted.seconds["read"]


def test_progress_is_told(lite0: Backbone) -> None:
    told: list[tuple[str, int, int | None]] = []
    detector = Detector(lite0).fit(NORMAL, progress=lambda *now: told.append(now))
    assert told == [("check", i, 4) for i in range(1, 5)] + [("fit", i, 4) for i in range(5)]
    told.clear()
    list(detector.predict(NORMAL, progress=lambda *now: told.append(now)))
    assert told == [("predict", i, 4) for i in range(5)]
    told.clear()
    detector.calibrate(NORMAL, cross_fit=2, progress=lambda *now: told.append(now))
    work = [done for stage, done, total in told if (stage, total) == ("calibrate", 8)]
    assert len(work) == len(told) - 4
    assert work == sorted(work)
    assert (work[0], work[-1]) == (0, 8)


# Fit


def test_a_fit_that_fails_leaves_the_old_state(fitted: Detector, tmp_path: Path) -> None:
    fitted.calibrate(OTHERS)
    before = list(fitted.predict(OTHERS))
    (tmp_path / "bad.png").write_text("no picture")
    for bad in (tmp_path, [], [OTHERS[0], failing_later(OTHERS[1], 1)]):
        with pytest.raises(InputError):
            fitted.fit(bad, rotate=True)
        after = list(fitted.predict(OTHERS))
        for one, other in zip(before, after, strict=True):
            assert other.mask is not None
            assert torch.equal(one.map, other.map)
        assert fitted.n_images == 4
        with pytest.raises(InputError, match="fit has seen"):
            fitted.calibrate(NORMAL[0])
    fitted.fit(OTHERS[:3])
    assert fitted.thresholds == {}
    assert fitted.n_images == 3


def test_bad_files_are_left_out_of_a_fit_when_asked(lite0: Backbone, tmp_path: Path) -> None:
    save(tmp_path / "a.png", NORMAL[0])
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(BadFilesError, match=r"b\.png: not an image.*\n.*skip_bad"):
        Detector(lite0).fit(tmp_path)
    assert Detector(lite0).fit(tmp_path, skip_bad=True).n_images == 1


def test_what_is_not_fitted_says_so(lite0: Backbone, tmp_path: Path) -> None:
    detector = Detector(lite0)
    for use in (
        lambda: detector.predict(NORMAL),
        lambda: detector.calibrate(NORMAL),
        lambda: detector.save(tmp_path / "d.safetensors"),
    ):
        with pytest.raises(InputError, match="not fitted; call fit"):
            use()
    assert list(tmp_path.iterdir()) == []
    assert repr(detector) == "Detector(efficientnet-lite0, MemoryBank(), not fitted)"


def test_the_published_mask_threshold_is_for_the_last_block_of_dinov2_only(lite0: Backbone) -> None:
    dino = backbone.load("random:dinov2-small", size=56, device="cpu")
    assert Detector(dino, models.create("memory_bank", masking=True)).model.mask_threshold == 10.0
    assert (
        Detector(dino, models.create("memory_bank", masking=True, mask_threshold=3.0)).model.mask_threshold
        == 3
    )
    assert Detector(dino).model.mask_threshold is None
    for layers in ([3], [10, 11]):
        other = backbone.load("random:dinov2-small", size=56, device="cpu", layers=layers)
        assert Detector(other, models.create("memory_bank", masking=True)).model.mask_threshold is None
    detector = Detector(lite0, models.create("memory_bank", masking=True))
    assert detector.model.mask_threshold is None
    with pytest.raises(InputError, match=r"masking needs mask_threshold.*10\.0 for DINOv2"):
        detector.fit(NORMAL)


# Calibration


def test_the_pixel_threshold_holds_on_the_normal_maps(fitted: Detector) -> None:
    threshold = fitted.calibrate(OTHERS, fpr=0.1)
    predictions = list(fitted.predict(OTHERS))
    pooled = torch.cat([p.map.flatten() for p in predictions])
    rate = float((pooled > threshold.value).double().mean())
    assert 0.09 < rate <= 0.1
    assert threshold.realized_rate == pytest.approx(rate, abs=1e-3)  # maps differ by rounding between batches
    assert threshold.interval is not None
    assert threshold.interval[0] <= rate <= threshold.interval[1]
    assert (threshold.method, threshold.n_images, threshold.n_pixels) == ("held-out", 4, 4 * 96 * 96)
    for p in predictions:
        assert p.is_anomalous is None
        assert p.mask is not None
        assert torch.equal(p.mask, p.map > threshold.value)
    (found,) = fitted.predict(spoiled(20))
    assert found.mask is not None
    assert found.mask[70:, 70:].float().mean() > 0.8


def test_the_image_threshold_decides_images(fitted: Detector) -> None:
    threshold = fitted.calibrate(OTHERS, fpr=0.2, level="image")
    assert threshold.value == max(p.score for p in fitted.predict(OTHERS))
    assert [p.is_anomalous for p in fitted.predict([OTHERS[0], spoiled(20)])] == [False, True]
    assert next(fitted.predict(OTHERS)).mask is None
    with pytest.raises(InputError, match="4 normal images cannot give an image threshold at fpr"):
        fitted.calibrate(OTHERS, level="image")
    assert fitted.thresholds == {"image": threshold}


def test_a_threshold_can_be_changed_by_assignment(fitted: Detector, tmp_path: Path) -> None:
    fitted.calibrate(OTHERS)
    before = next(fitted.predict(spoiled(20)))
    lower = dataclasses.replace(fitted.thresholds["pixel"], value=fitted.thresholds["pixel"].value / 2)
    fitted.thresholds["pixel"] = lower
    after = next(fitted.predict(spoiled(20)))
    assert before.mask is not None
    assert after.mask is not None
    assert after.mask.sum() > before.mask.sum()
    fitted.save(tmp_path / "d.safetensors")
    loaded = Detector.load(tmp_path / "d.safetensors", backbone=fitted.backbone)
    assert loaded.thresholds == {"pixel": lower}
    again = next(loaded.predict(spoiled(20)))
    assert again.mask is not None
    assert torch.equal(again.mask, after.mask)


@pytest.mark.parametrize("ending", [".png", ".bmp", ".tif"])
def test_images_of_the_fit_are_refused_under_any_name(lite0: Backbone, tmp_path: Path, ending: str) -> None:
    files = [save(tmp_path / "fit" / f"{i}.png", image) for i, image in enumerate(NORMAL)]
    copy = save(tmp_path / "new" / f"renamed{ending}", NORMAL[2])
    detector = Detector(lite0).fit(files)
    detector.save(tmp_path / "d.safetensors")
    for used in (detector, Detector.load(tmp_path / "d.safetensors", backbone=lite0)):
        with pytest.raises(InputError, match=rf"seen.*too low: {copy}; give other.*cross_fit=5"):
            used.calibrate([OTHERS[0], copy])
        with pytest.raises(InputError, match=r"fit/0\.png, .*fit/1\.png, .*fit/2\.png and 1 more"):
            used.calibrate(tmp_path / "fit")
        assert used.thresholds == {}
        assert used.calibrate(OTHERS).n_images == 4


def test_a_slice_of_air_is_no_image_of_the_fit(lite0: Backbone, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 50)):
        volume = np.stack([np.zeros((96, 96)), weave(seed)[..., 0], weave(seed + 1)[..., 0]], -1)
        nibabel.save(nibabel.Nifti1Image(volume.astype(np.int16), np.eye(4)), tmp_path / f"{name}.nii")
    detector = Detector(lite0).fit(tmp_path / "a.nii")
    assert detector.calibrate(tmp_path / "b.nii").n_images == 3
    with pytest.raises(InputError, match=r"a\.nii\[z=1\], .*a\.nii\[z=2\]; give"):
        detector.calibrate(tmp_path / "a.nii")
    assert detector.calibrate(tmp_path / "a.nii", cross_fit=3).n_images == 3


@pytest.mark.parametrize("rotate", [False, True])
def test_cross_fit_scores_each_part_by_a_model_of_the_others(lite0: Backbone, rotate: bool) -> None:
    images = NORMAL[:3]
    detector = Detector(lite0).fit(images, rotate=rotate)
    threshold = detector.calibrate(images, cross_fit=3, fpr=0.1)
    maps = []
    for i, image in enumerate(images):
        others = Detector(lite0).fit([other for j, other in enumerate(images) if j != i], rotate=rotate)
        maps.append(next(others.predict(image)).map.numpy())
    pooled = np.sort(np.concatenate([m.ravel() for m in maps]))
    assert threshold.value == pytest.approx(pooled[-1 - int(0.1 * pooled.size)], abs=1e-5)
    assert (threshold.method, threshold.n_images) == ("cross-fit 3", 3)
    assert 0 < threshold.realized_rate <= 0.1


def test_cross_fit_takes_the_images_of_the_fit_only(fitted: Detector) -> None:
    with pytest.raises(InputError, match=r"not among them: array\[1\]; leave them out"):
        fitted.calibrate([NORMAL[0], OTHERS[0]], cross_fit=2)
    with pytest.raises(InputError, match="cross_fit=5: 4 images can be cut into 2 to 4 parts"):
        fitted.calibrate(NORMAL, cross_fit=5)
    with pytest.raises(InputError, match="at least 2 images, and there is 1"):
        fitted.calibrate(NORMAL[0], cross_fit=2)
    with pytest.raises(InputError, match="unknown level 'voxel'; one of pixel, image"):
        fitted.calibrate(OTHERS, level="voxel")
    with pytest.raises(InputError, match="fpr is 5"):
        fitted.calibrate(OTHERS, fpr=5)
    assert fitted.thresholds == {}


# Volumes


def test_volumes_are_read_later_as_in_the_fit(lite0: Backbone, tmp_path: Path) -> None:
    first, second = scan(tmp_path / "a.nii.gz"), scan(tmp_path / "b.nii.gz", seed=30)
    reading = {"axis": "axial", "window": (40.0, 200.0)}
    detector = Detector(lite0).fit(data.samples(first, **reading))
    assert detector.reading == {"axis": 2, "window": (40.0, 200.0), "percentiles": (0.5, 99.5)}
    truth = [p.map for p in detector.predict(data.samples(second, **reading))]
    detector.save(tmp_path / "d.safetensors")
    for used in (detector, Detector.load(tmp_path / "d.safetensors", backbone=lite0)):
        found = list(used.predict(second))
        assert [p.source for p in found] == [f"{second}[z={i}]" for i in range(4)]
        torch.testing.assert_close([p.map for p in found], truth, rtol=0, atol=0)
        other = [p.map for p in used.predict(data.samples(second))]
        assert not torch.equal(other[0], truth[0])
        assert used.reading == detector.reading
    assert Detector(lite0).fit(NORMAL).reading == {}
