from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import ExifTags, Image

from dinofast import data, imaging
from dinofast.errors import BadFilesError, InputError


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (12, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def mask(path: Path, size: tuple[int, int] = (12, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    truth = np.zeros(size, np.uint8)
    truth[2:4, 3:6] = 1
    Image.fromarray(truth).save(path)
    return path


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    root = tmp_path / "bottle"
    picture(root / "train/good/001.png", 1)
    picture(root / "train/good/000.png", 2)
    picture(root / "test/good/000.png", 3)
    picture(root / "test/crack/000.png", 4)
    mask(root / "ground_truth/crack/000_mask.png")
    return root


def test_a_path_is_read_when_asked(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    (sample,) = data.samples(path)
    assert (sample.source, sample.path, sample.label, sample.volume) == (str(path), path, None, None)
    assert sample.mask() is None
    np.testing.assert_array_equal(sample.load(), np.asarray(Image.open(path)))
    picture(path, seed=1)
    np.testing.assert_array_equal(sample.load(), np.asarray(Image.open(path)))


def test_a_folder_is_searched_recursively_and_sorted_by_name(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/10.jpg", "a.tif", ".hidden.png", ".git/x.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    found = [Path(s.source).relative_to(tmp_path).as_posix() for s in data.samples(tmp_path)]
    assert found == ["a.tif", "b/10.jpg", "b/2.PNG"]


def test_a_glob_obeys_the_same_rules(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.png", "c/3.png"):
        picture(tmp_path / name)
    (tmp_path / "b/notes.txt").write_text("not an image")
    assert [Path(s.source).name for s in data.samples(f"{tmp_path}/b/*")] == ["1.png", "2.png"]
    assert len(data.samples(f"{tmp_path}/**/*.png")) == 3


def test_a_name_with_glob_characters_that_exists_is_a_file(tmp_path: Path) -> None:
    path = picture(tmp_path / "a[1].png")
    assert [s.path for s in data.samples(str(path))] == [path]


def test_arrays_tensors_and_pillow_images_give_the_same_pixels() -> None:
    batch = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    tensors = torch.from_numpy(batch).movedim(-1, 1)
    for source, names in [
        (batch, ["array[0]", "array[1]"]),
        (tensors, ["tensor[0]", "tensor[1]"]),
        (list(batch), ["array[0]", "array[1]"]),
        ([Image.fromarray(b) for b in batch], ["image[0]", "image[1]"]),
        (iter(tensors), ["tensor[0]", "tensor[1]"]),
    ]:
        found = data.samples(source)
        assert [s.source for s in found] == names
        np.testing.assert_array_equal(np.stack([s.load() for s in found]), batch)
    for one in (batch[0], tensors[0], Image.fromarray(batch[0])):
        (sample,) = data.samples(one)
        np.testing.assert_array_equal(sample.load(), batch[0])
    (gray,) = data.samples(batch[0, ..., 0])
    np.testing.assert_array_equal(gray.load(), batch[0, ..., :1].repeat(3, -1))


def test_an_iterable_may_mix_everything(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    known = data.Sample("mine", lambda: np.zeros((2, 2, 3), np.uint8), label=1)
    found = data.samples([path, known, [np.zeros((2, 4, 4, 3), np.uint8)]])
    assert [s.source for s in found] == [str(path), "mine", "array[2][0][0]", "array[2][0][1]"]
    assert found[1] is known


def test_samples_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    samples = data.samples([picture(tmp_path / "a.png"), np.eye(4, dtype=np.uint8)])
    for sample, copy in zip(samples, pickle.loads(pickle.dumps(samples)), strict=True):
        np.testing.assert_array_equal(sample.load(), copy.load())


@pytest.mark.parametrize(
    ("size", "name"), [((7, 7), "tiny.png"), ((20, 20000), "wide.png"), ((20000, 20), "tall.png")]
)
def test_odd_sizes_are_kept_as_they_are(tmp_path: Path, size: tuple[int, int], name: str) -> None:
    (sample,) = data.check(data.samples(picture(tmp_path / name, size=size)))
    assert sample.load().shape == (*size, 3)


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "L", "1", "LA", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(np.arange(120, dtype=np.uint16).reshape(12, 10) * 500).save(path)
    else:
        Image.open(picture(tmp_path / "source.png")).convert(mode).save(path)
    (sample,) = data.check(data.samples(path))
    assert sample.load().shape == (12, 10, 3)
    assert sample.load().dtype == np.uint8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p, r"holds no images; looked for files ending in \.bmp, .*\.png.*\.nii\.gz"),
        (lambda p: p / "absent.png", r"absent\.png: no such file or folder; give a path"),
        (lambda p: f"{p}/*.png", r"\*\.png: no image matches; looked for .*\.png"),
        (lambda p: [], "no images: an empty list was given"),
        (lambda p: np.zeros((0, 4, 4, 3), np.uint8), "no images: an empty ndarray"),
        (lambda p: np.zeros(4, np.uint8), r"array: shape \(4,\) is no image"),
        (lambda p: torch.zeros(1, 2, 3, 4, 5), r"tensor: shape \(1, 2, 3, 4, 5\) is no image"),
        (lambda p: [np.zeros((4, 4), np.uint8), 3], "cannot use int as images; give a path"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.samples(make(tmp_path))  # type: ignore[operator]


def test_a_bad_array_is_named_by_its_place() -> None:
    good = np.random.default_rng(0).random((4, 4))
    for bad in (good * np.nan, good + 1, good.astype(np.int32), np.zeros((4, 4, 2), np.uint8)):
        with pytest.raises(BadFilesError, match=r"array\[1\]: "):
            data.check(data.samples([good, bad]))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    picture(tmp_path / "good.png")
    whole = picture(tmp_path / "torn.png", size=(64, 64)).read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("RGB", (8, 8), (9, 8, 7)).save(tmp_path / "blank.png")
    return tmp_path


def test_all_bad_files_are_reported_at_once_and_by_name(mixed: Path) -> None:
    with pytest.raises(BadFilesError, match=r"4 files cannot be used") as error:
        data.check(data.samples(mixed))
    names = ("blank.png", "empty.png", "text.png", "torn.png")
    assert list(error.value.files) == [str(mixed / name) for name in names]
    assert error.value.files[str(mixed / "blank.png")].endswith("the same color: blank or corrupt; remove it")
    assert all(str(mixed) not in reason for reason in error.value.files.values())
    assert "--skip-bad (skip_bad=True in Python)" in str(error.value)


def test_skip_bad_returns_the_good_and_logs_the_others(mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = []
    with caplog.at_level(logging.WARNING, "dinofast.data"):
        good = data.check(
            data.samples(mixed), skip_bad=True, progress=lambda done, total: seen.append((done, total))
        )
    assert [s.path for s in good] == [mixed / "good.png"]
    assert seen == [(i, 5) for i in range(1, 6)]
    assert len(caplog.records) == 4
    assert f"skipped {mixed / 'torn.png'}: truncated" in caplog.text


def test_nothing_good_is_an_error_even_with_skip_bad(mixed: Path) -> None:
    (mixed / "good.png").unlink()
    with pytest.raises(BadFilesError, match="No usable image is left"):
        data.check(data.samples(mixed), skip_bad=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = picture(tmp_path / "locked.png")
    path.chmod(0)
    with pytest.raises(BadFilesError, match=r"locked\.png: may not be read"):
        data.check(data.samples(path))


@pytest.mark.parametrize(
    ("normal", "bad"), [("good", "bad"), ("Normal", "tumor"), ("no", "yes"), ("OK", "NG")]
)
def test_good_bad_trees(tmp_path: Path, normal: str, bad: str) -> None:
    picture(tmp_path / normal / "1.png")
    picture(tmp_path / bad / "deep" / "2.png")
    found = data.folder(tmp_path)
    assert {(Path(s.source).name, s.label) for s in found} == {("1.png", 0), ("2.png", 1)}
    assert all(s.mask() is None for s in found)


def test_mvtec_layout(mvtec: Path) -> None:
    train = data.folder(mvtec, "train")
    assert [Path(s.source).name for s in train] == ["000.png", "001.png"]
    assert [s.label for s in train] == [0, 0]
    crack, good = data.folder(mvtec, "test")
    assert (crack.label, good.label) == (1, 0)
    expected = np.zeros((12, 10), bool)
    expected[2:4, 3:6] = True
    for sample, truth in ((crack, expected), (good, np.zeros((12, 10), bool))):
        found = sample.mask()
        assert found is not None
        assert found.dtype == bool
        np.testing.assert_array_equal(found, truth)
    assert len(data.folder(mvtec)) == 4


def test_train_and_test_without_masks(mvtec: Path) -> None:
    (mvtec / "ground_truth/crack/000_mask.png").unlink()
    (mvtec / "ground_truth/crack").rmdir()
    (mvtec / "ground_truth").rmdir()
    assert all(s.mask() is None for s in data.folder(mvtec))


def test_a_missing_mask_names_image_and_mask(mvtec: Path) -> None:
    image = picture(mvtec / "test/crack/001.png")
    with pytest.raises(BadFilesError) as error:
        data.folder(mvtec, "test")
    assert error.value.files == {
        str(image): f"no mask at {mvtec / 'ground_truth' / 'crack' / '001_mask.png'}"
    }
    assert len(data.folder(mvtec, "train")) == 2


def test_a_mask_of_another_size_stops_the_check(mvtec: Path) -> None:
    mask(mvtec / "ground_truth/crack/000_mask.png", (12, 11))
    with pytest.raises(BadFilesError, match=r"000_mask\.png: its size \(H, W\) = \(12, 11\) is not that of"):
        data.check(data.folder(mvtec, "test"))


WIDE_MASK = np.pad(np.ones((2, 3), np.uint16), ((2, 8), (3, 4)))


def palette(index: npt.NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(index, "P")
    image.putpalette([9, 9, 9, 0, 0, 0])  # index 0 is the mask, 1 is black
    return image


def with_alpha(values: npt.NDArray[np.uint8]) -> Image.Image:
    opaque = np.full_like(values, 255)
    return Image.fromarray(np.stack([values, 0 * values, 0 * values, opaque], -1))


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        Image.fromarray,
        lambda m: Image.fromarray(m.astype(bool)),
        lambda m: palette((1 - m).astype(np.uint8)),
        lambda m: with_alpha(m.astype(np.uint8)),
    ],
    ids=["16 bits", "1 bit", "palette", "one channel, alpha"],
)
def test_no_value_of_a_mask_is_too_small(mvtec: Path, make: Callable[[Any], Image.Image]) -> None:
    make(WIDE_MASK).save(mvtec / "ground_truth/crack/000_mask.png")
    found = data.folder(mvtec, "test")[0].mask()
    assert found is not None
    np.testing.assert_array_equal(found, WIDE_MASK == 1)


def test_an_anomalous_image_with_an_empty_mask_is_refused(mvtec: Path) -> None:
    Image.fromarray(0 * WIDE_MASK).save(mvtec / "ground_truth/crack/000_mask.png")
    with pytest.raises(BadFilesError, match=r"000_mask\.png: marks no pixel, and .*crack/000\.png is in"):
        data.check(data.folder(mvtec, "test"))


def test_a_torn_mask_is_named(mvtec: Path) -> None:
    path = mvtec / "ground_truth/crack/000_mask.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(BadFilesError, match=r"000_mask\.png: truncated or corrupt image"):
        data.check(data.folder(mvtec, "test"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_the_size_is_that_of_the_upright_image(tmp_path: Path, name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (10, 14)).save(tmp_path / name, exif=exif)
    assert imaging.image_size(tmp_path / name) == imaging.decode(tmp_path / name).shape[:2]


@pytest.mark.parametrize(("name", "size"), [("a.jpg", (30, 20)), ("a.png", (20, 20))])
def test_the_size_is_read_without_the_pixels(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    path = picture(tmp_path / name, size=size)
    path.write_bytes(path.read_bytes()[:-100])
    assert imaging.image_size(path) == size
    with pytest.raises(InputError, match="truncated"):
        imaging.decode(path)


def test_an_image_beyond_the_limit_of_pillow_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(InputError, match=r"a\.png: too large, more than 100 pixels, .*; cut it into tiles"):
        imaging.decode(path)


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ([], None, "no normal class; it holds no folders"),
        (["a.png"], None, "no normal class; it holds no folders"),
        (["bad/a.png", "ugly/a.png"], None, "its folders are bad, ugly; name one good, no, normal, ok"),
        (["good/a.png"], "test", "has no folder 'test'; leave split out"),
        (["good/a.png"], "valid", "split 'valid': one of"),
        (["good/a.png", "bad/a.txt"], None, "bad: holds no images"),
        (["good/a.nii"], None, r"a\.nii: volumes carry their truth in mask files"),
    ],
)
def test_folders_that_cannot_be_used(
    tmp_path: Path, files: list[str], split: str | None, message: str
) -> None:
    for name in files:
        if name.endswith(".png"):
            picture(tmp_path / name)
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("text")
    with pytest.raises(InputError, match=message):
        data.folder(tmp_path, split)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent: no such folder"):
        data.folder(tmp_path / "absent")


def test_shots_are_consecutive_runs_of_the_sorted_files(tmp_path: Path) -> None:
    files = [picture(tmp_path / f"{i}.png") for i in range(7)]
    order = np.random.default_rng(0).permutation(7)
    shuffled = data.samples([files[i] for i in order])
    assert [s.path for s in data.shots(shuffled, 2, 0)] == files[:2]
    assert [s.path for s in data.shots(shuffled, 2, 2)] == files[4:6]
    arrays = data.samples(np.zeros((12, 4, 4, 3), np.uint8))
    assert data.shots(arrays, 3, 3) == arrays[9:]


@pytest.mark.parametrize(("k", "seed"), [(2, 3), (8, 0), (0, 0), (1, -1)])
def test_shots_past_the_end_are_refused(k: int, seed: int) -> None:
    with pytest.raises(InputError, match=rf"k = {k} (with|and) seed = {seed}"):
        data.shots(data.samples(np.zeros((7, 4, 4, 3), np.uint8)), k, seed)
