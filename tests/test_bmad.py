"""The BMAD loader on miniatures of every layout in circulation."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from bmad_trees import BONE, LAYOUTS, NUMBERS, SIZES, bmad_tree, picture, read
from textures import save

from dinofast.data import bmad
from dinofast.errors import BadFilesError, InputError


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_set(tmp_path: Path, layout: str, above: bool) -> None:
    root = bmad_tree(tmp_path, layout)
    found = bmad.load(tmp_path if above else root)
    name = layout.split("-")[0]
    assert (found.name, found.root) == (name, root)
    assert {split: len(listed) for split, listed in found.splits().items()} == {
        split: sum(numbers) for split, numbers in NUMBERS.items()
    }
    assert found.counts == {
        f"{split}/{kind}": count
        for split, numbers in NUMBERS.items()
        for kind, count in zip(("good", "ungood"), numbers, strict=True)
    }
    assert [s.label for s in found.train] == [0, 0, 0]
    assert [s.mask() for s in found.train] == [None] * 3
    assert [s.label for s in found.valid] == [0, 0, 0, 1, 1]
    assert [s.label for s in found.test] == [0, 0, 1, 1, 1]
    for seed, sample in enumerate([*found.train, *found.valid, *found.test], 1):
        image, levels = picture(seed, name, sample.label == 1)
        assert sample.path is not None
        assert sample.path.stem.startswith(f"{seed:05d}_")
        np.testing.assert_array_equal(sample.load(), image[..., :3])
        if sample.mask_reader is not None:
            np.testing.assert_array_equal(sample.mask(), levels > 0)
    assert found.lone_masks == []
    assert "masks" in found.folders["test/ungood"]


@pytest.mark.parametrize("case", [str.upper, str.lower, str.capitalize])
def test_letters_of_any_case(tmp_path: Path, case: object) -> None:
    root = bmad_tree(tmp_path / "x")
    renamed = tmp_path / "y"
    for path in sorted(root.rglob("*.png")):
        *folders, file = path.relative_to(root).parts
        save(renamed.joinpath("BRATS2021_Slice", *map(case, folders), file), read(path))  # type: ignore[call-overload]
    found = bmad.load(renamed)
    assert (found.name, len(found.test)) == ("brain", 5)


def test_good_images_without_masks_have_empty_ones(tmp_path: Path) -> None:
    found = bmad.load(bmad_tree(tmp_path, "resc-L1", good_masks=False))
    masks = [s.mask() for s in found.test]
    assert [None if m is None else m.shape for m in masks] == [SIZES["resc"]] * 5
    assert [bool(m.any()) for m in masks if m is not None] == [False, False, True, True, True]


def test_image_and_mask_are_paired_by_stem(tmp_path: Path) -> None:
    root = bmad_tree(tmp_path, "liver-L1")
    masks = sorted((root / "test/label/Ungood").iterdir())
    before = [s.mask() for s in bmad.load(root).test]
    for path in masks:
        values = read(path)
        path.unlink()
        save(path.with_suffix(".TIF"), values)
    for old, sample in zip(before, bmad.load(root).test, strict=True):
        np.testing.assert_array_equal(sample.mask(), old)
    masks[0].with_suffix(".TIF").unlink()
    with pytest.raises(BadFilesError) as stop:
        bmad.load(root)
    (file,) = stop.value.files
    assert Path(file).name == masks[0].name
    assert f"no mask {masks[0].stem}.* in {root / 'test/label/Ungood'}" in str(stop.value)


def test_mask_rules_on_colored_levels(tmp_path: Path) -> None:
    root = bmad_tree(tmp_path)
    file = root / "test/Ungood/label/00011_60.png"
    stored = read(file)
    assert stored.shape[2] == 4
    assert {tuple(v) for v in stored[..., :3].reshape(-1, 3).tolist()} == {tuple(v) for v in BONE.tolist()}
    for rule, expected in (("any", stored[..., :3].any(axis=2)), ("255", (stored == 255).all(axis=2))):
        sample = bmad.load(root, mask_rule=rule).test[2]
        assert sample.path is not None
        assert sample.path.name == file.name
        np.testing.assert_array_equal(sample.mask(), expected)
    stored = stored.copy()
    stored[0, :3, :3] = [[254], [255], [200]]  # one level below the top is not the top
    save(file, stored)
    np.testing.assert_array_equal(
        bmad.load(root, mask_rule="255").test[2].mask()[0, :3],  # type: ignore[index]
        [False, True, False],
    )
    stored[..., :3] = 0
    save(file, stored)
    assert not bmad.load(root).test[2].mask().any()  # type: ignore[union-attr]


def test_labels_from_masks(tmp_path: Path) -> None:
    root = bmad_tree(tmp_path)
    file = root / "test/Ungood/label/00011_60.png"
    save(file, read(file) * np.array([0, 0, 0, 1], np.uint8))
    assert [s.label for s in bmad.load(root).test] == [0, 0, 1, 1, 1]
    found = bmad.load(root, labels="mask")
    assert [s.label for s in found.test] == [0, 0, 0, 1, 1]
    assert (found.labels, found.counts["test/ungood"]) == ("mask", 3)


def test_counts_are_compared_with_the_published_ones(tmp_path: Path) -> None:
    found = bmad.load(bmad_tree(tmp_path, "resc-L1"))
    differences = found.differences()
    assert set(differences) == {"BMAD", "DPMM"}
    assert differences["BMAD"]["valid/good"] == (3, 45)
    assert differences["DPMM"]["valid/good"] == (3, 70)
    assert differences["DPMM"]["test/ungood"] == (3, 764)
    found.counts.update(bmad.PUBLISHED_COUNTS["resc"]["DPMM"])
    assert found.differences()["DPMM"] == {}
    assert found.differences()["BMAD"] == {"valid/good": (70, 45), "valid/ungood": (45, 70)}
    totals = {
        name: [sum(v for k, v in t.items() if k.startswith(split)) for split in ("train", "valid", "test")]
        for name, tables in bmad.PUBLISHED_COUNTS.items()
        for t in tables.values()
    }
    assert totals == {"brain": [7500, 83, 3715], "liver": [1542, 166, 1493], "resc": [4297, 115, 1805]}


def test_overlap_is_found_by_content(tmp_path: Path) -> None:
    root = bmad_tree(tmp_path, "liver-L1")
    assert bmad.overlap(bmad.load(root).splits()) == {}
    copy = root / "test/img/good/renamed.tif"
    save(copy, read(root / "valid/img/good/00004_60.png"))
    shutil.copy(root / "train/good/00001_60.png", root / "valid/img/good/x.png")
    assert bmad.overlap(bmad.load(root).splits()) == {
        "train & valid": [(str(root / "train/good/00001_60.png"), str(root / "valid/img/good/x.png"))],
        "valid & test": [(str(root / "valid/img/good/00004_60.png"), str(copy))],
    }
    assert set(bmad.overlap(bmad.load(root).splits(), lambda _: b"same")) == {
        "train & valid",
        "train & test",
        "valid & test",
    }


def test_the_set_can_be_named(tmp_path: Path) -> None:
    root = bmad_tree(tmp_path).rename(tmp_path / "data")
    found = bmad.load(root)
    assert (found.name, found.differences()) == (None, {})
    assert bmad.load(root, "brain").differences()["BMAD"]["train/good"] == (3, 7500)


def test_masks_without_image_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = bmad_tree(tmp_path)
    (root / "test/Ungood/img/00011_60.png").unlink()
    with caplog.at_level(logging.WARNING, "dinofast.data"):
        found = bmad.load(root)
    assert found.lone_masks == ["test/Ungood/label/00011_60.png"]
    assert "1 masks have no image, test/Ungood/label/00011_60.png among them" in caplog.text


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def several(root: Path) -> None:
    shutil.copytree(root, root.parent / "more" / "RESC")
    root.rename(root.parent / "one")


BROKEN = [
    (shutil.rmtree, "BraTS2021_slice: no such folder; give the one that holds train, valid and test"),
    (lambda r: shutil.rmtree(r / "train"), "no known layout; looked for train/good.*It holds test, valid"),
    (lambda r: shutil.rmtree(r / "valid"), "BraTS2021_slice: has no valid or val folder; .*valid/good"),
    (
        lambda r: emptied(r / "valid/good/img"),
        "valid/good/img: holds no images, and good images of valid are u",
    ),
    (lambda r: shutil.rmtree(r / "valid/good"), "valid/good: holds no images"),
    (
        lambda r: shutil.rmtree(r / "test/good"),
        "test/good: holds no images, and good images of test are scored",
    ),
    (
        lambda r: emptied(r / "train/good"),
        "train/good: holds no images, and good images of train are learned",
    ),
    (lambda r: emptied(r / "test/Ungood/img"), "test/Ungood/img: holds no images, and ungood images of test"),
    (
        lambda r: shutil.rmtree(r / "test/Ungood/label"),
        "00013_62.png: no label or anomaly_mask folder in .*test",
    ),
    (
        lambda r: shutil.copytree(r / "valid/good", r / "train/Ungood"),
        "3 anomalous images in train; only normal",
    ),
    (lambda r: (r / "Valid").mkdir(), "BraTS2021_slice: holds Valid, valid, which mean the same here"),
    (lambda r: (r / "val").mkdir(), "BraTS2021_slice: holds val, valid, which mean the same here"),
    (lambda r: (r / "test/img/good").mkdir(parents=True), "test: good images in several folders, "),
    (lambda r: (r / "test_label/Ungood").mkdir(parents=True), "test: ungood masks in several folders, "),
    (
        lambda r: shutil.copy(r / "train/good/00001_60.png", r / "train/good/00001_60.TIF"),
        "00001_60.png: 00001_60.TIF has the same stem; keep one of the two",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), BROKEN, ids=[m[:40] for _, m in BROKEN])
def test_trees_that_cannot_be_used(tmp_path: Path, spoil: object, message: str) -> None:
    root = bmad_tree(tmp_path)
    spoil(root)  # type: ignore[operator]
    with pytest.raises(InputError, match=message):
        bmad.load(root)


def test_valid_needs_no_anomalous_images(tmp_path: Path) -> None:
    root = bmad_tree(tmp_path)
    shutil.rmtree(root / "valid/Ungood")
    found = bmad.load(root)
    assert [s.label for s in found.valid] == [0, 0, 0]
    assert found.differences()["BMAD"]["valid/ungood"] == (0, 44)


def test_several_sets_are_refused_by_name(tmp_path: Path) -> None:
    first, second = bmad_tree(tmp_path / "a"), bmad_tree(tmp_path / "a", "resc-L1")
    with pytest.raises(InputError, match=f"{tmp_path}: holds several sets, {first}, {second}; give one"):
        bmad.load(tmp_path)
    with pytest.raises(InputError, match=r"no known layout.*It holds no folders"):
        bmad.load(first / "train" / "good")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "heart"}, "set 'heart': one of brain, liver, resc"),
        ({"mask_rule": "128"}, "mask rule '128': one of any, 255"),
        ({"labels": "both"}, "labels 'both': one of folder, mask"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bmad.load(tmp_path, **options)


def test_a_mask_of_another_size_is_refused_when_read(tmp_path: Path) -> None:
    root = bmad_tree(tmp_path)
    file = root / "test/Ungood/label/00011_60.png"
    save(file, read(file)[:-1])
    found = bmad.load(root)
    with pytest.raises(
        InputError, match=rf"{file}: its size \(H, W\) = \(59, 60\) is not that of .*, \(60, 60\)"
    ):
        found.test[2].mask()
    with pytest.raises(InputError, match="is not that of"):
        bmad.load(root, labels="mask")
