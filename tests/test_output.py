from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from textures import save, scan, spoiled, weave

from dinofast import Detector, data, files, output
from dinofast.backbone import Backbone
from dinofast.data import Sample
from dinofast.errors import BadFilesError, InputError
from dinofast.output import Writer, write_predictions
from dinofast.types import Prediction


@pytest.fixture(scope="module")
def detector(lite0: Backbone) -> Detector:
    fitted = Detector(lite0).fit([weave(i) for i in range(3)])
    fitted.calibrate([weave(i) for i in range(10, 13)])
    return fitted


def prediction(sample: Sample, value: float = 0.5) -> Prediction:
    return Prediction(value, torch.full(sample.load().shape[:2], value), None, None, sample.source)


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def names(images: list[Sample], folder: Path) -> list[str]:
    """Write constant maps of 0, 1, 2, ... and tell where each one went."""
    with Writer(folder, images) as writer:
        for i, sample in enumerate(images):
            writer.write(sample, prediction(sample, float(i)))
    for i, row in enumerate(writer.rows):
        if row["map"].endswith(".tif"):
            assert np.unique(np.asarray(Image.open(folder / row["map"]))).tolist() == [i], row
    return [row["map"] for row in writer.rows]


def test_overlays_without_matplotlib_stop_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    images = data.samples(weave(0))
    with pytest.raises(InputError, match=r"drawing needs matplotlib: pip install 'dinofast\[viz\]'"):
        Writer(tmp_path / "out", images, 0.5)
    assert not (tmp_path / "out").exists()
    slices = data.samples(scan(tmp_path / "a.nii.gz"))
    for drawn, threshold in ((images, None), (slices, 0.5)):  # nothing is to be drawn
        Writer(tmp_path / "out", drawn, threshold)


def test_an_image_gives_its_map_an_overlay_and_a_row(detector: Detector, tmp_path: Path) -> None:
    files = [
        save(tmp_path / "in" / "a.png", weave(20)),
        save(tmp_path / "in" / "b.png", spoiled(21, (120, 100))),
    ]
    rows = write_predictions(detector, tmp_path / "in", tmp_path / "out")
    names = ["a_map.tif", "a_overlay.png", "b_map.tif", "b_overlay.png", "scores.json"]
    assert written(tmp_path / "out") == names
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == rows
    for file, row, truth in zip(files, rows, detector.predict(files), strict=True):
        assert row["source"] == str(file)
        assert row["score"] == pytest.approx(truth.score, abs=1e-6)
        assert truth.mask is not None
        assert row["anomalous_share"] == pytest.approx(float(truth.mask.float().mean()), abs=1e-3)
        with Image.open(tmp_path / "out" / row["map"]) as image:
            assert image.mode == "F"
            np.testing.assert_allclose(np.asarray(image), truth.map, rtol=0, atol=1e-6)
        with Image.open(tmp_path / "out" / row["overlay"]) as image:
            image.load()
            assert image.width == 512
    assert rows[0]["anomalous_share"] < 0.15 < rows[1]["anomalous_share"]


def test_without_a_threshold_there_is_nothing_to_draw(detector: Detector, tmp_path: Path) -> None:
    bare = Detector(detector.backbone, detector.model)
    rows = write_predictions(bare, [weave(20)], tmp_path)
    assert written(tmp_path) == ["array_0_map.tif", "scores.json"]
    assert set(rows[0]) == {"source", "score", "is_anomalous", "anomalous_share", "map"}
    assert rows[0]["anomalous_share"] is None


@pytest.mark.parametrize("threshold", [0.0, -1e-7, 1e-9])
def test_a_threshold_at_zero_can_be_drawn(tmp_path: Path, threshold: float) -> None:
    images = data.samples([weave(0)])
    with Writer(tmp_path, images, threshold) as writer:
        writer.write(images[0], prediction(images[0], 0.0))
    assert (tmp_path / "array_0_overlay.png").stat().st_size > 1000


def test_equal_names_in_other_folders_stay_apart(tmp_path: Path) -> None:
    plain = ["good/000.png", "bad/001.png", "bad/001.jpg", "bad/deep/000.png"]
    nasty = ["a__b.png", "a/b.png", "c d.png", "c_d.png", "C_D.png", "e.png.tif", "e.png", "e.jpg"]
    images = data.samples([save(tmp_path / "in" / name, weave(0)) for name in plain + nasty])
    found = names(images, tmp_path / "out")
    assert len({name.casefold() for name in found}) == 12
    assert found[:4] == [
        "good__000_map.tif",
        "bad__001.png_map.tif",
        "bad__001.jpg_map.tif",
        "bad__deep__000_map.tif",
    ]


def test_images_in_memory_stay_apart(tmp_path: Path) -> None:
    alone = [data.samples(weave(i))[0] for i in range(3)]
    assert [s.source for s in alone] == ["array"] * 3
    batch = data.samples([weave(3), [weave(4)]])
    file = data.samples(save(tmp_path / "array.png", weave(5)))
    odd = [Sample("a/b: c", alone[0].reader), Sample("", alone[0].reader)]
    found = names([*alone, *batch, *file, *odd], tmp_path / "out")
    assert len(set(found)) == 8
    assert found[3:5] == ["array_0_map.tif", "array_1_0_map.tif"]
    assert len(written(tmp_path / "out")) == 9


def test_an_image_given_twice_has_one_map(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", weave(0))
    images = data.samples([file, file])
    with Writer(tmp_path / "out", images) as writer:
        for sample in images:
            writer.write(sample, prediction(sample))
    assert [row["map"] for row in writer.rows] == ["a_map.tif"] * 2
    assert written(tmp_path / "out") == ["a_map.tif", "scores.json"]


def test_a_volume_gives_a_volume_on_its_grid(detector: Detector, tmp_path: Path) -> None:
    path = scan(tmp_path / "in" / "scan.nii.gz", 3)
    rows = write_predictions(detector, path, tmp_path / "out", batch_size=2)
    assert written(tmp_path / "out") == ["scan_map.nii.gz", "scores.json"]
    assert [row["source"] for row in rows] == [f"{path}[z={i}]" for i in range(3)]
    assert {row["map"] for row in rows} == {"scan_map.nii.gz"}
    before, after = nibabel.load(path), nibabel.load(tmp_path / "out" / "scan_map.nii.gz")
    np.testing.assert_array_equal(after.affine, before.affine)
    assert after.shape == before.shape
    found = tmp_path / "again.nii.gz"
    data.volume(path).write([p.map for p in detector.predict(path)], found)
    np.testing.assert_allclose(after.get_fdata(), nibabel.load(found).get_fdata(), rtol=0, atol=1e-6)
    assert (after.get_fdata() > 0).all(axis=(0, 1)).tolist() == [True] * 3


def test_some_slices_some_twice_and_two_axes(tmp_path: Path) -> None:
    path = scan(tmp_path / "scan.nii.gz", 4)
    opened = data.volume(path)
    images = opened.samples([3, 1])
    with Writer(tmp_path / "some", images) as writer:
        for i, sample in enumerate(images, 1):
            writer.write(sample, prediction(sample, float(i)))
    found = nibabel.load(tmp_path / "some" / "scan_map.nii.gz").get_fdata()
    assert [np.unique(found[..., i]).tolist() for i in range(4)] == [[0], [2], [0], [1]]

    twice = [*data.samples(path), *data.samples(path)]
    assert set(names(twice, tmp_path / "twice")) == {"scan_map.nii.gz"}

    coronal = data.samples(path, axis="coronal")
    both = names([*data.samples(path), *coronal], tmp_path / "both")
    assert len(set(both)) == 2
    for name in set(both):
        assert nibabel.load(tmp_path / "both" / name).shape == (96, 96, 4)


def test_a_volume_that_is_not_finished_is_not_written(tmp_path: Path) -> None:
    images = [*data.samples(weave(0)), *data.samples(scan(tmp_path / "scan.nii.gz", 3))]

    def stopped() -> None:
        with Writer(tmp_path / "out", images) as writer:
            for sample in images[:3]:
                writer.write(sample, prediction(sample))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert written(tmp_path / "out") == ["array_map.tif", "scores.json"]
    rows = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [row["map"] for row in rows] == ["array_map.tif", None, None]


def test_inputs_are_never_overwritten(detector: Detector, tmp_path: Path) -> None:
    save(tmp_path / "a.png", weave(0))
    kept = save(tmp_path / "a_overlay.png", weave(1))
    before = kept.read_bytes()
    with pytest.raises(InputError, match=rf"{kept}: an input, .*overwritten; choose another folder"):
        write_predictions(detector, tmp_path, tmp_path)
    assert kept.read_bytes() == before
    assert written(tmp_path) == ["a.png", "a_overlay.png"]


def test_bad_files_stop_the_run_before_anything_is_written(detector: Detector, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png", weave(0))
    save(tmp_path / "in" / "tiny.png", weave(0, (7, 7)))
    with pytest.raises(BadFilesError, match=r"tiny\.png: 7x7 pixels"):
        write_predictions(detector, tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    told: list[tuple[str, int, int | None]] = []
    rows = write_predictions(
        detector, tmp_path / "in", tmp_path / "out", skip_bad=True, progress=lambda *now: told.append(now)
    )
    assert [Path(row["source"]).name for row in rows] == ["a.png"]
    assert told == [("check", 1, 2), ("check", 2, 2), ("predict", 0, 1), ("predict", 1, 1)]


@pytest.mark.parametrize("full_after", [0, 1, 4])
def test_a_full_disk_leaves_whole_files_only(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_after: int
) -> None:
    folder, left = tmp_path / "out", iter(range(full_after))
    whole = files.os.fsync

    def fsync(handle: int) -> None:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        whole(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\).*has space"):
        write_predictions(detector, [weave(i) for i in range(3)], folder)
    assert not [name for name in written(folder) if name.startswith(".")]
    for name in written(folder):
        if name.endswith((".tif", ".png")):
            Image.open(folder / name).load()
        else:
            json.loads((folder / name).read_text())
    assert len(written(folder)) == min(full_after, 4)


def test_a_file_in_place_of_the_folder_is_named(detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(InputError, match=r"out/scores\.json: cannot be written .*Choose a folder"):
        write_predictions(detector, weave(0), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "in the way"


def test_rows_are_json(detector: Detector, tmp_path: Path) -> None:
    detector_with_both: Any = Detector(detector.backbone, detector.model)
    detector_with_both.fit([weave(i) for i in range(3)])
    detector_with_both.calibrate([weave(i) for i in range(10, 14)], fpr=0.2, level="image")
    rows = output.write_predictions(detector_with_both, [weave(20), spoiled(20)], tmp_path)
    assert [row["is_anomalous"] for row in json.loads((tmp_path / "scores.json").read_text())] == [
        False,
        True,
    ]
    assert rows[1]["score"] > rows[0]["score"]
