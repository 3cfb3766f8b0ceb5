"""Decoding and preprocessing: the stated rules, Pillow's own resize, and every image that must be refused."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinofast.backbone.preprocess import MEAN, STD, Preprocess, decode
from dinofast.errors import InputError
from dinofast.imaging import as_rgb

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
WIDE = RNG.integers(0, 65536, (40, 60), dtype=np.uint16)


def png16(path: Path, values: np.ndarray) -> None:
    """Write uint16 (H, W, 3) as a 16-bit color PNG, which Pillow cannot."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.bmp"])
def test_8_bit_color_is_kept(name, tmp_path):
    Image.fromarray(COLOR).save(tmp_path / name)
    assert np.array_equal(decode(tmp_path / name), COLOR)


def test_jpeg_is_what_pillow_reads(tmp_path):
    Image.fromarray(COLOR).save(tmp_path / "a.jpg", quality=95)
    assert np.array_equal(decode(tmp_path / "a.jpg"), np.asarray(Image.open(tmp_path / "a.jpg")))


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_16_bit_gray_keeps_its_high_byte(name, tmp_path):
    Image.fromarray(WIDE).save(tmp_path / name)
    assert np.array_equal(decode(tmp_path / name), np.repeat((WIDE >> 8).astype(np.uint8)[..., None], 3, 2))


def test_16_bit_color_keeps_its_high_byte(tmp_path):
    values = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    png16(tmp_path / "a.png", values)
    assert np.array_equal(decode(tmp_path / "a.png"), values >> 8)


def test_big_endian_and_32_bit_tiff(tmp_path):
    Image.fromarray(WIDE.astype(np.int32)).save(tmp_path / "i.tiff")
    assert np.array_equal(decode(tmp_path / "i.tiff")[..., 0], WIDE >> 8)
    Image.frombytes("I;16B", (60, 40), WIDE.astype(">u2").tobytes()).save(tmp_path / "b.tiff")
    assert np.array_equal(decode(tmp_path / "b.tiff")[..., 0], WIDE >> 8)
    Image.fromarray(WIDE.astype(np.float32) / 65535).save(tmp_path / "f.tiff")
    assert np.array_equal(decode(tmp_path / "f.tiff")[..., 0], np.rint(WIDE / 65535 * 255))
    Image.fromarray(WIDE.astype(np.int32) + 70000).save(tmp_path / "i.tiff")
    with pytest.raises(InputError, match=r"i\.tiff.*32-bit"):
        decode(tmp_path / "i.tiff")
    Image.fromarray(WIDE.astype(np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(InputError, match=r"f\.tiff.*\[0, 1\]"):
        decode(tmp_path / "f.tiff")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    image = Image.fromarray(COLOR).convert(mode)
    if mode == "P":
        image.info["transparency"] = bytes(range(256))
    if mode == "RGBA":
        image.putalpha(7)
    suffix = "tiff" if mode in ("CMYK", "YCbCr") else "png"
    image.save(tmp_path / f"a.{suffix}")
    found = decode(tmp_path / f"a.{suffix}")
    assert (found.shape, found.dtype) == ((40, 60, 3), np.uint8)
    plain = image.convert("RGBA").convert("RGB") if mode == "P" else image.convert("RGB")
    assert np.abs(found.astype(int) - np.asarray(plain)).max() <= 2
    assert np.array_equal(found, as_rgb(Image.open(tmp_path / f"a.{suffix}")))


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COLOR).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(decode(tmp_path / "a.png"), np.rot90(COLOR, -1))


@pytest.mark.parametrize(
    "image",
    [COLOR, COLOR.astype(np.uint16) * 257, COLOR / 255, (COLOR / 255).astype(np.float32),
     np.dstack([COLOR, COLOR[..., :1]]), torch.from_numpy(COLOR).movedim(-1, 0), Image.fromarray(COLOR),
     torch.from_numpy(COLOR).movedim(-1, 0).double() / 255],
)  # fmt: skip
def test_all_forms_of_one_image_agree(image):
    assert np.array_equal(as_rgb(image), COLOR)


@pytest.mark.parametrize(
    "gray", [COLOR[..., 0], COLOR[..., :1], torch.from_numpy(COLOR[..., 0])[None].clone()]
)
def test_one_channel_is_repeated(gray):
    assert np.array_equal(as_rgb(gray), np.repeat(COLOR[..., :1], 3, 2))


@pytest.mark.parametrize(
    ("image", "says"),
    [(np.full((20, 20), np.nan), "NaN"), (np.full((20, 20), np.inf), "NaN or inf"),
     (np.full((20, 20), 7.0), r"\[0, 1\]"), (np.full((20, 20), -0.1), r"\[0, 1\]"),
     (np.zeros((20, 20), np.int64), "int64"), (np.zeros((20, 20), bool), "bool"),
     (np.zeros(20, np.uint8), r"\(20,\)"), (np.zeros((2, 20, 20, 3), np.uint8), "batch or volume"),
     (np.zeros((20, 20, 2), np.uint8), "2 channels"), (torch.zeros(20, 20, 3), r"\(C, H, W\)"),
     (np.zeros((0, 20), np.uint8), "no pixels"), (3, "int")],
)  # fmt: skip
def test_images_that_cannot_be_used(image, says):
    with pytest.raises(InputError, match=f"scan 3.*{says}"):
        as_rgb(image, "scan 3")


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match=r"absent\.png.*no such file"):
        decode(tmp_path / "absent.png")
    with pytest.raises(InputError, match="folder"):
        decode(tmp_path)
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(InputError, match=r"text\.png.*not an image"):
        decode(tmp_path / "text.png")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"empty\.png"):
        decode(tmp_path / "empty.png")
    first = Image.fromarray(COLOR)
    first.save(tmp_path / "pages.tiff", save_all=True, append_images=[first])
    with pytest.raises(InputError, match="2 pages"):
        decode(tmp_path / "pages.tiff")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files(suffix, share, tmp_path):
    path = tmp_path / f"torn.{suffix}"
    Image.fromarray(RNG.integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(InputError, match=rf"torn\.{suffix}"):
        decode(path)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.fromarray(COLOR).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"bomb\.png"):
        decode(tmp_path / "bomb.png")


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (97, 1013), (448, 448), (30, 30)], ids=str)
@pytest.mark.parametrize("patch", [14, 16])
def test_pixels_are_within_a_level_of_pillow(shape, patch):
    rgb = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    pixels = Preprocess(448, patch)(rgb)
    height, width = shape
    longer = int(448 * max(shape) / min(shape))
    wanted = (448, longer) if height <= width else (longer, 448)
    pillow = np.asarray(Image.fromarray(rgb).resize(wanted[::-1], Image.Resampling.BICUBIC))
    pillow = pillow[: wanted[0] // patch * patch, : wanted[1] // patch * patch]
    levels = pixels.movedim(0, -1).double() * torch.tensor(STD) + torch.tensor(MEAN)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert levels.shape == pillow.shape
    assert float((levels - torch.from_numpy(pillow.copy()) / 255).abs().max()) < 1 / 255 / 100


@pytest.mark.parametrize(
    ("size", "resize", "image", "wanted"),
    [(448, "edge", (100, 200), (448, 896)), (450, "edge", (100, 100), (448, 448)),
     (100, "edge", (299, 100), (294, 98)), (56, "squash", (100, 200), (56, 56)),
     ((60, 90), "edge", (10, 1000), None), ((60, 90), "edge", (100, 1000), (56, 84))],
)  # fmt: skip
def test_sizes_follow_the_stated_rule(size, resize, image, wanted):
    preprocess = Preprocess(size, 14, resize)
    if wanted is None:
        with pytest.raises(InputError, match="smaller than one patch"):
            preprocess(np.zeros(image, np.uint8))
    else:
        assert preprocess.cropped_size(*image) == wanted
        assert preprocess(np.zeros(image, np.uint8)).shape[1:] == wanted


def test_the_crop_keeps_the_top_left_corner():
    rgb = RNG.integers(0, 256, (45, 50, 3), dtype=np.uint8)
    assert np.array_equal(Preprocess(45, 14).resized(rgb), rgb[:42, :42])


def test_a_tiny_image_names_its_size(tmp_path):
    Image.fromarray(COLOR[:7, :7]).save(tmp_path / "tiny.png")
    with pytest.raises(InputError, match=r"tiny\.png.*7x7.*14x14"):
        Preprocess(448, 14)(tmp_path / "tiny.png")


def test_a_ribbon_names_the_numbers_and_the_remedy():
    with pytest.raises(InputError, match=r"ribbon: 20000x20 .*32000x32 = 1024000 patches.*16384.*tiles"):
        Preprocess(448, 14)(np.zeros((20000, 20), np.uint8), "ribbon")
    assert Preprocess(448, 14, "squash")(np.zeros((20000, 20), np.uint8)).shape == (3, 448, 448)


def test_a_constant_image_is_fine():
    assert bool(Preprocess(28, 14)(np.full((30, 30), 9, np.uint8)).isfinite().all())


@pytest.mark.parametrize("bad", [(13, 14, "edge"), ((448, 7), 14, "edge"), (448, 14, "stretch")])
def test_settings_that_cannot_be_used(bad):
    with pytest.raises(InputError):
        Preprocess(*bad)


def test_config_is_plain():
    assert Preprocess((28, 42), 14).config["size"] == [28, 42]
    assert Preprocess((28, 42), 14).config["resize"] == "squash"
