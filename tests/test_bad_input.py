"""Every bad input that the main job promises to survive, end to end: what, which file, what to do."""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from command_line import LITE, Call
from PIL import Image
from textures import RGB, save, scan, weave

from dinofast import Detector, artifact, backbone, data, files, models
from dinofast.backbone import Backbone
from dinofast.errors import ArtifactError, BadFilesError, InputError
from dinofast.output import write_predictions
from dinofast.types import Features

GOOD = [weave(i) for i in range(3)]


@pytest.fixture
def fitted(lite0: Backbone) -> Detector:
    return Detector(lite0).fit(GOOD)


def torn(path: Path, share: float = 0.5) -> Path:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    return path


def text(path: Path) -> Path:
    path.write_text("this is a letter, not a picture")
    return path


def empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def constant(path: Path) -> Path:
    return save(path, np.full((96, 96, 3), 130, np.uint8))


def torn_volume(path: Path) -> Path:
    return torn(scan(path))


def torn_plain_volume(path: Path) -> Path:
    packed = scan(path.with_name("whole.nii.gz"))
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    return torn(path, 0.9)


def four_dimensional(path: Path) -> Path:
    nibabel.save(nibabel.Nifti1Image(np.zeros((9, 9, 4, 3), np.float32), np.eye(4)), path)
    return path


def blank_volume(path: Path) -> Path:
    nibabel.save(nibabel.Nifti1Image(np.full((96, 96, 3), 7, np.float32), np.eye(4)), path)
    return path


BAD_FILES = [
    ("torn.png", lambda p: torn(save(p, weave(9))), "truncated or corrupt image .*; fetch or export it"),
    ("torn.jpg", lambda p: torn(save(p, weave(9))), "truncated or corrupt image .*; fetch or export it"),
    ("letter.png", text, "not an image that Pillow can read; remove or convert it"),
    ("empty.png", empty, "not an image that Pillow can read; remove or convert it"),
    ("constant.png", constant, "every pixel has the same color: blank or corrupt; remove it"),
    ("tiny.png", lambda p: save(p, weave(9, (7, 7))), "7x7 pixels: smaller than one patch of 16x16; give a"),
    ("wide.png", lambda p: save(p, weave(9, (20, 20000))), "20x20000 pixels .* patches, more than 16384;"),
    ("tall.png", lambda p: save(p, weave(9, (20000, 20))), "20000x20 pixels .* patches, more than 16384;"),
    ("torn.nii.gz", torn_volume, "truncated or not NIfTI .*; fetch or export it again"),
    ("torn.nii", torn_plain_volume, "truncated or not NIfTI .*; fetch or export it again"),
    ("blank.nii.gz", blank_volume, "every voxel is 7; the volume is blank or corrupt"),
    ("nan.nii.gz", lambda p: scan(p, a=np.nan), '1 of 36864 voxels are NaN or infinite; .*nonfinite="zero"'),
    ("inf.nii.gz", lambda p: scan(p, a=np.inf, b=-np.inf), '2 of 36864 voxels are NaN or infinite; .*"zero"'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "message"), BAD_FILES, ids=[name for name, *_ in BAD_FILES])
def test_a_bad_file_is_named_and_stops_the_run(
    fitted: Detector, tmp_path: Path, name: str, make: Callable[[Path], Path], message: str
) -> None:
    save(tmp_path / "good.png", weave(8))
    bad = make(tmp_path / name)
    said = rf"(?s)1 file cannot be used:\n  {re.escape(str(bad))}: .*{message}.*\n.*skip_bad=True"
    for use in (fitted.fit, fitted.calibrate):
        with pytest.raises(BadFilesError, match=said) as error:
            use(tmp_path)
        assert list(error.value.files) == [str(bad)]
    with pytest.raises(InputError, match=rf"(?s){re.escape(str(bad))}.*{message}"):
        list(fitted.predict(bad))
    found = [p.source for p in fitted.predict(tmp_path, skip_bad=True)]
    assert found == [str(tmp_path / "good.png")]
    assert fitted.calibrate(tmp_path, skip_bad=True).n_images == 1


def test_a_volume_that_is_not_3d_is_named_when_listed(fitted: Detector, tmp_path: Path) -> None:
    bad = four_dimensional(tmp_path / "time.nii.gz")
    for use in (fitted.fit, fitted.predict, fitted.calibrate):
        with pytest.raises(
            InputError, match=rf"{bad}: is 4-D, shape \(9, 9, 4, 3\); volumes are 3-D: split it"
        ):
            use(bad)


@pytest.mark.parametrize("bad", [{"a": np.nan}, {"a": np.inf}, {"a": -np.inf, "b": np.nan}])
def test_voxels_that_are_not_finite_can_be_zero(
    fitted: Detector, tmp_path: Path, bad: dict[str, float]
) -> None:
    path = scan(tmp_path / "a.nii.gz", **bad)
    for prediction in fitted.predict(data.samples(path, nonfinite="zero")):
        assert prediction.map.isfinite().all()


def test_pixels_that_are_not_finite_are_named(fitted: Detector) -> None:
    for value in (np.nan, np.inf):
        image = weave(9).astype(np.float32) / 255
        image[3, 4, 1] = value
        for source in (image, torch.from_numpy(image).movedim(-1, 0)):
            with pytest.raises(
                InputError, match=r"(array|tensor): holds NaN or infinity; replace these pixels"
            ):
                list(fitted.predict(source))


def test_an_empty_folder_is_named(fitted: Detector, tmp_path: Path) -> None:
    for use in (fitted.fit, fitted.predict, fitted.calibrate):
        with pytest.raises(
            InputError, match=rf"{tmp_path}: holds no images; looked for files ending in \.bmp"
        ):
            use(tmp_path)
        with pytest.raises(InputError, match="no images: an empty list was given; give at least one"):
            use([])


def test_one_image_is_enough_where_it_can_be(lite0: Backbone, tmp_path: Path) -> None:
    detector = Detector(lite0).fit(save(tmp_path / "a.png", weave(0)))
    threshold = detector.calibrate(save(tmp_path / "b.png", weave(1)))
    assert threshold.interval is None
    assert "on 1 normal image, held-out" in str(threshold)
    (found,) = detector.predict(tmp_path / "a.png")
    assert found.score < 1e-5
    with pytest.raises(
        InputError, match=r"1 normal images cannot give an image threshold.*it takes 19; give more"
    ):
        detector.calibrate(tmp_path / "b.png", level="image")
    with pytest.raises(InputError, match="cross_fit needs at least 2 images, and there is 1; give more"):
        detector.calibrate(tmp_path / "a.png", cross_fit=5)
    with pytest.raises(InputError, match="the bank has 36 rows, n_neighbors is 99; give more normal images"):
        Detector(lite0, models.create("memory_bank", n_neighbors=99)).fit(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("mode", "name"),
    [("RGBA", "a.png"), ("P", "a.png"), ("LA", "a.png"), ("CMYK", "a.tif"), ("CMYK", "a.jpg")],
)
def test_every_mode_is_scored_as_its_rgb(fitted: Detector, tmp_path: Path, mode: str, name: str) -> None:
    image = Image.fromarray(weave(9)).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(weave(3)[..., 0]))
    image.save(tmp_path / name)
    (found,) = fitted.predict(tmp_path / name)
    (truth,) = fitted.predict(Image.open(tmp_path / name).convert("RGB"))
    torch.testing.assert_close(found.map, truth.map, rtol=0, atol=0)
    assert fitted.fit(tmp_path / name).n_images == 1


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scored_as_their_high_byte(fitted: Detector, tmp_path: Path, name: str) -> None:
    gray: RGB = weave(9)[..., 0]
    low = np.random.default_rng(0).integers(0, 256, gray.shape, np.uint16)
    Image.fromarray(gray.astype(np.uint16) * 256 + low).save(tmp_path / name)
    (found,) = fitted.predict(tmp_path / name)
    (truth,) = fitted.predict(gray)
    torch.testing.assert_close(found.map, truth.map, rtol=0, atol=0)


def test_a_long_image_is_scored_when_squashed() -> None:
    squashing = backbone.load("efficientnet-lite0", size=96, resize="squash", device="cpu")
    (found,) = Detector(squashing).fit(GOOD).predict(weave(9, (20, 20000)))
    assert found.map.shape == (20, 20000)


# Banks that do not belong


def test_a_bank_of_another_d_is_refused(fitted: Detector, tmp_path: Path) -> None:
    other = models.create("memory_bank").fit([Features(torch.rand(1, 6, 6, 8), None, (96, 96))])
    said = (
        r"this memory_bank was fitted on features of D = 8, and efficientnet-lite0 .*\] gives D = 232; load"
    )
    with pytest.raises(InputError, match=said):
        Detector(fitted.backbone, other)
    path = tmp_path / "d.safetensors"
    fitted.save(path)
    tensors, config = artifact.read(path, kind="detector")
    artifact.write(path, "detector", {**tensors, "model.bank": other.state()["bank"]}, config)
    with pytest.raises(ArtifactError, match=rf"{path}: does not hold together \({said}.*fit again"):
        Detector.load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("random:dinov2-small", 56), "kind 'efficientnet-lite0' in the file, 'dinov2' here"),
        (("efficientnet-lite0", 64), "size 96 in the file, 64 here"),
    ],
)
def test_a_bank_from_another_backbone_or_preprocessing_is_refused(
    fitted: Detector, tmp_path: Path, options: tuple[str, int], message: str
) -> None:
    path = tmp_path / "d.safetensors"
    fitted.save(path)
    other = backbone.load(options[0], size=options[1], device="cpu")
    with pytest.raises(
        ArtifactError, match=rf"{path}: was fitted with efficientnet-lite0, .*{message}.*fit again"
    ):
        Detector.load(path, backbone=other)


def test_a_patch_of_zeros_is_far_from_everything(lite0: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    call = lite0.network.forward

    def dead(pixels: torch.Tensor, position: torch.Tensor) -> Any:
        patches, cls = call(pixels, position)
        patches[:, 2, 3] = 0
        return patches, cls

    healthy = Detector(lite0).fit(GOOD)
    monkeypatch.setattr(lite0.network, "forward", dead)
    (found,) = healthy.predict(weave(9))
    assert found.map.isfinite().all()
    row, column = divmod(int(found.map.argmax()), 96)
    assert (row // 16, column // 16) == (2, 3)
    assert found.score == pytest.approx(1.0, abs=1e-6)
    for metric in ("cosine", "euclidean"):
        model = models.create("memory_bank", metric=metric, n_neighbors=2)
        (found,) = Detector(lite0, model).fit(GOOD).predict(weave(9))
        assert found.map.isfinite().all()
        assert np.isfinite(found.score)


# Output that cannot be written


@pytest.mark.parametrize("step", ["fit", "predict", "demo"])
def test_a_read_only_output_is_named(
    fitted: Detector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
    step: str,
) -> None:
    image, saved = save(tmp_path / "a.png", weave(5)), tmp_path / "d.safetensors"
    fitted.save(saved)
    locked = tmp_path / "locked"
    locked.mkdir()

    opened = os.open

    def refuse(name: Any, *args: Any, **options: Any) -> int:  # root may write anywhere: refuse as the system
        path = Path(os.fsdecode(name))
        if locked in (path, *path.parents):
            raise PermissionError(13, "Permission denied", str(name))
        return opened(name, *args, **options)

    monkeypatch.setattr(files.os, "open", refuse)
    args = {
        "fit": ("fit", image, *LITE, "--out", locked / "d.safetensors"),
        "predict": ("predict", saved, image, "--out", locked),
        "demo": ("demo", "--data", "brain", "--output", locked),
    }[step]
    said = call(*args)
    assert said.code == 1
    assert said.out == ""
    assert re.search(
        rf"^dinofast: {locked}/.*: cannot be written \(Permission denied\).*Choose a folder", said.err, re.M
    )
    assert list(locked.iterdir()) == []


@pytest.mark.parametrize("step", ["fit", "predict"])
def test_a_full_output_is_named(
    fitted: Detector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
    step: str,
) -> None:
    image, saved, out = save(tmp_path / "a.png", weave(5)), tmp_path / "d.safetensors", tmp_path / "out"
    fitted.save(saved)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    args = {
        "fit": ("fit", image, *LITE, "--out", out / "d.safetensors"),
        "predict": ("predict", saved, image, "--out", out),
    }[step]
    said = call(*args)
    assert said.code == 1
    assert re.search(
        rf"^dinofast: {out}/.*: cannot be written \(No space left on device\).*has space", said.err, re.M
    )
    assert "Traceback" not in said.err
    assert list(out.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_device_that_is_full(fitted: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real error of a real write: the temporary file leads to /dev/full."""
    opened = os.open

    def leading_nowhere(name: Any, *args: Any, **options: Any) -> int:
        handle = opened(name, *args, **options)
        if Path(os.fsdecode(name)).name.startswith(".writing-"):
            Path(name).unlink()
            Path(name).symlink_to("/dev/full")
        return handle

    monkeypatch.setattr(files.os, "open", leading_nowhere)
    before = Path("/dev/full").stat().st_mode
    with pytest.raises(InputError, match=r"scores\.json: cannot be written \(No space left on device\)"):
        write_predictions(fitted, weave(5), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert Path("/dev/full").stat().st_mode == before


# Ctrl-C


def stopping(after: int) -> Callable[[str, int, int | None], None]:
    left = iter(range(after))

    def progress(*_: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("after", range(0, 13, 2))
def test_an_interrupted_run_changes_nothing(fitted: Detector, tmp_path: Path, after: int) -> None:
    fitted.calibrate([weave(5)])
    path = tmp_path / "d.safetensors"
    fitted.save(path)
    before = path.read_bytes()
    if after < 7:
        with pytest.raises(KeyboardInterrupt):
            fitted.fit([weave(i) for i in range(20, 23)], progress=stopping(after))
    with pytest.raises(KeyboardInterrupt):
        fitted.calibrate(GOOD, cross_fit=3, fpr=0.2, progress=stopping(after))
    fitted.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["d.safetensors"]  # noqa: PTH208 - hidden files too
