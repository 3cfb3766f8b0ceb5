from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt
import pytest
import torch
from nibabel import orientations

from dinofast import data
from dinofast.data import nifti
from dinofast.data.nifti import Volume
from dinofast.errors import BadFilesError, InputError

SHAPE = (5, 6, 7)
CODES = ["RAS", "LAS", "LPS", "PIR", "ASL", "IPR", "SLA"]
ZOOMS = (0.5, 1.25, 3.0)


def rotation(degrees: float) -> npt.NDArray[np.float64]:
    angle = np.deg2rad(degrees)
    c, s = np.cos(angle), np.sin(angle)
    about_x = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    about_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return about_x @ about_z


def affine(codes: str, tilt: float = 0.0) -> npt.NDArray[np.float64]:
    ornt = orientations.axcodes2ornt(tuple(codes))
    matrix = np.zeros((4, 4))
    for column, (row, sign) in enumerate(ornt):
        matrix[int(row), column] = sign * ZOOMS[column]
    matrix[:3, :3] = rotation(tilt) @ matrix[:3, :3]
    matrix[:, 3] = (-90, 126, -72, 1)
    return matrix


def voxels(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> npt.NDArray[np.int16]:
    return np.random.default_rng(seed).integers(-1000, 1000, shape, np.int16)


def save(path: Path, array: npt.NDArray[np.generic], matrix: npt.NDArray[np.float64] | None = None) -> Path:
    image = nibabel.Nifti1Image(array, affine("RAS") if matrix is None else matrix)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("tilt", [0.0, 20.0])
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_a_marked_voxel_comes_back_to_its_place(tmp_path: Path, codes: str, tilt: float, axis: str) -> None:
    array = voxels()
    spot = (1, 4, 2)
    array[spot] = 5000
    path = save(tmp_path / "in.nii.gz", array, affine(codes, tilt))
    stack = data.volume(path, axis=axis, window=(2000, 5000))
    maps = np.stack([s.load()[..., 0] for s in stack.samples()]).astype(np.float32) / 255
    assert maps.shape == stack.stack_shape
    assert maps.sum() == 1
    stack.write(maps, tmp_path / "out.nii.gz")

    before, after = nibabel.load(path), nibabel.load(tmp_path / "out.nii.gz")
    found = after.get_fdata()
    assert np.argwhere(found).tolist() == [list(spot)]
    assert after.shape == before.shape
    assert after.get_data_dtype() == np.float32
    np.testing.assert_array_equal(after.affine, before.affine)
    assert after.header.get_zooms() == before.header.get_zooms()
    assert after.header.get_xyzt_units() == before.header.get_xyzt_units()
    for code in ("qform_code", "sform_code"):
        assert after.header[code] == before.header[code]


@pytest.mark.parametrize("codes", CODES)
def test_every_voxel_comes_back_to_its_place(tmp_path: Path, codes: str) -> None:
    stack = data.volume(save(tmp_path / "in.nii", voxels(), affine(codes)), axis=1)
    maps = np.random.default_rng(1).random(stack.stack_shape, np.float32)
    stack.write(torch.from_numpy(maps), tmp_path / "map.nii")
    again = data.volume(tmp_path / "map.nii", axis=1, window=(0, 1))
    got = np.stack([s.load()[..., 0] for s in again.samples()])
    np.testing.assert_array_equal(got, np.rint(maps * 255))


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize(
    ("axis", "letter", "point", "index", "row_col"),
    [
        # 7×7×7 around the origin; a point right (+x), front (+y) or head (+z) of it, and where it must show
        ("axial", "z", (2, 0, 0), 3, (3, 1)),
        ("axial", "z", (0, 2, 0), 3, (1, 3)),
        ("axial", "z", (0, 0, 2), 5, (3, 3)),
        ("coronal", "y", (2, 0, 0), 3, (3, 1)),
        ("coronal", "y", (0, 2, 0), 5, (3, 3)),
        ("coronal", "y", (0, 0, 2), 3, (1, 3)),
        ("sagittal", "x", (2, 0, 0), 5, (3, 3)),
        ("sagittal", "x", (0, 2, 0), 3, (3, 1)),
        ("sagittal", "x", (0, 0, 2), 3, (1, 3)),
    ],
)
def test_slices_are_shown_as_stated_whatever_the_orientation(
    tmp_path: Path,
    codes: str,
    axis: str,
    letter: str,
    point: tuple[int, int, int],
    index: int,
    row_col: tuple[int, int],
) -> None:
    matrix = affine(codes)
    matrix[:3, :3] = np.sign(matrix[:3, :3])
    matrix[:3, 3] = -matrix[:3, :3] @ (3, 3, 3)
    array = np.zeros((7, 7, 7), np.uint8)
    array[tuple(np.rint(np.linalg.inv(matrix) @ (*point, 1))[:3].astype(int))] = 200
    path = save(tmp_path / "a.nii", array, matrix)
    samples = data.volume(path, axis=axis, percentiles=(0, 100)).samples()
    shown = np.stack([s.load()[..., 0] for s in samples])
    assert np.argwhere(shown).tolist() == [[index, *row_col]]
    assert samples[index].source == f"{path}[{letter}={index}]"


def test_samples_accept_volumes_and_pass_their_options(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz", voxels())
    save(tmp_path / "b.nii", voxels(seed=1))
    assert len(data.samples(tmp_path)) == 14
    coronal = data.samples([tmp_path / "a.nii.gz"], axis="coronal", window=(-5, 5))
    assert len(coronal) == 6
    assert coronal[3].volume is not None
    assert (coronal[3].volume.index, coronal[3].volume.volume.window) == (3, (-5, 5))
    assert len(data.samples(data.volume(tmp_path / "b.nii", axis=0))) == 5
    assert data.shots(data.samples(tmp_path / "b.nii")[::-1], 2, 1)[0].source.endswith("[z=2]")


def test_window_and_percentiles(tmp_path: Path) -> None:
    array = np.arange(1000, dtype=np.float32).reshape(10, 10, 10)
    path = save(tmp_path / "a.nii", array)
    window = np.stack([s.load() for s in data.volume(path, axis=0, window=(100, 355)).samples()])
    order = array.transpose(0, 2, 1)[:, ::-1, ::-1]
    np.testing.assert_array_equal(window[..., 0], np.clip(order - 100, 0, 255))
    np.testing.assert_array_equal(window[..., 1], window[..., 0])
    low, high = np.percentile(array, (10, 90))
    shown = np.stack([s.load()[..., 0] for s in data.volume(path, axis=0, percentiles=(10, 90)).samples()])
    np.testing.assert_allclose(shown, np.clip((order - low) / (high - low), 0, 1) * 255, atol=0.51)


def test_scale_and_offset_of_the_header_count(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(voxels(), affine("RAS"))
    image.header.set_slope_inter(2, -10)
    nibabel.save(image, tmp_path / "a.nii")
    values = nibabel.load(tmp_path / "a.nii").get_fdata()
    (first, *_) = data.volume(tmp_path / "a.nii", axis=0, window=(-1000, 1000)).samples()
    expected = np.clip((values[0].T[::-1, ::-1] + 1000) / 2000, 0, 1) * 255
    np.testing.assert_allclose(first.load()[..., 0], expected, atol=0.51)


def test_chosen_slices_and_zeros_elsewhere(tmp_path: Path) -> None:
    stack = data.volume(save(tmp_path / "a.nii", voxels()))
    chosen = stack.samples([4, 1])
    assert [s.volume.index for s in chosen if s.volume] == [4, 1]
    maps = [torch.full(stack.stack_shape[1:], 4.0), torch.full(stack.stack_shape[1:], float("nan"))]
    stack.write(maps, tmp_path / "map.nii.gz", [4, 1])
    found = nibabel.load(tmp_path / "map.nii.gz").get_fdata()
    assert (found[..., 4] == 4).all()
    assert np.isnan(found[..., 1]).all()
    assert not found[..., [0, 2, 3, 5, 6]].any()


def test_the_display_range_of_the_input_is_not_kept(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(voxels(), affine("RAS"))
    image.header["cal_min"], image.header["cal_max"] = 100, 900
    nibabel.save(image, tmp_path / "a.nii")
    stack = data.volume(tmp_path / "a.nii")
    stack.write(np.ones(stack.stack_shape), tmp_path / "map.nii")
    header = nibabel.load(tmp_path / "map.nii").header
    assert (header["cal_min"], header["cal_max"]) == (0, 0)


def test_the_same_maps_give_the_same_bytes(tmp_path: Path) -> None:
    stack = data.volume(save(tmp_path / "a.nii.gz", voxels()))
    for name in ("one.nii.gz", "two.nii.gz"):
        stack.write(np.ones(stack.stack_shape), tmp_path / name)
    assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "two.nii.gz").read_bytes()


def test_trailing_axes_of_length_one_are_kept(tmp_path: Path) -> None:
    stack = data.volume(save(tmp_path / "a.nii.gz", voxels((*SHAPE, 1, 1))))
    assert stack.stack_shape == (7, 6, 5)
    stack.write(np.ones(stack.stack_shape), tmp_path / "map.nii.gz")
    assert nibabel.load(tmp_path / "map.nii.gz").shape == nibabel.load(tmp_path / "a.nii.gz").shape


def test_a_mask_gives_labels_and_truth(tmp_path: Path) -> None:
    truth = np.zeros(SHAPE, np.uint8)
    truth[1, 2, 3] = 7
    path = save(tmp_path / "a.nii", voxels(), affine("LPS"))
    mask = save(tmp_path / "m.nii", truth, affine("LPS"))
    samples = data.volume(path, mask=mask).samples()
    assert [s.label for s in samples] == [0, 0, 0, 1, 0, 0, 0]
    found = samples[3].mask()
    assert found is not None
    assert np.argwhere(found).tolist() == [[2, 1]]
    found[:] = True
    assert samples[3].mask().sum() == 1  # type: ignore[union-attr]
    assert data.volume(path).samples()[0].mask() is None
    with pytest.raises(InputError, match="has no ground truth"):
        data.volume(path).mask(0)


def test_slices_of_air_are_fine_in_a_volume(tmp_path: Path) -> None:
    array = voxels()
    array[..., 0] = -1000
    assert len(data.check(data.samples(save(tmp_path / "a.nii", array)))) == 7


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_volume_cut_short_is_named(tmp_path: Path, suffix: str, share: float) -> None:
    path = save(tmp_path / f"cut{suffix}", voxels((20, 20, 20)))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    good = save(tmp_path / "good.nii", voxels())
    with pytest.raises(InputError, match=rf"cut{suffix}: truncated or not NIfTI"):
        data.check(data.samples([good, path]))


def test_one_bad_volume_is_reported_once_and_skipped_whole(tmp_path: Path) -> None:
    path = save(tmp_path / "cut.nii.gz", voxels((20, 20, 20)))
    path.write_bytes(path.read_bytes()[:5000])
    good = save(tmp_path / "good.nii", voxels())
    with pytest.raises(BadFilesError) as error:
        data.check(data.samples(tmp_path))
    assert list(error.value.files) == [str(path)]
    assert {s.path for s in data.check(data.samples(tmp_path), skip_bad=True)} == {good}
    nifti._pixels.cache_clear()
    data.check(data.samples(tmp_path), skip_bad=True)
    assert nifti._pixels.cache_info().misses == 2


def test_a_text_file_is_no_volume(tmp_path: Path) -> None:
    for name, content in (
        ("a.nii", b"text"),
        ("b.nii.gz", b"text"),
        ("c.nii.gz", gzip.compress(b"text" * 200)),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: truncated or not NIfTI"):
            data.samples(tmp_path / name)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (voxels((5, 6, 7, 3)), r"bad\.nii: is 4-D, shape \(5, 6, 7, 3\); volumes are 3-D: split it"),
        (voxels((5, 6)), r"bad\.nii: is 2-D"),
        (np.ones(SHAPE, np.complex64), r"bad\.nii: voxels are complex64"),
        (np.ones(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]), r"bad\.nii: voxels are "),
    ],
)
def test_headers_that_cannot_be_used(tmp_path: Path, array: npt.NDArray[np.generic], message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.volume(save(tmp_path / "bad.nii", array))


def test_an_affine_that_maps_nowhere(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(voxels(), affine("RAS"))
    image.header["srow_x"] = 0
    image.header.set_qform(None, 0)
    path = tmp_path / "flat.nii"
    path.write_bytes(image.to_bytes())
    raw = bytearray(path.read_bytes())
    raw[280:296] = bytes(16)
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"flat\.nii: its affine maps no voxel"):
        data.volume(path)


def test_nan_and_infinite_voxels(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random(SHAPE, np.float32)
    array[0, 0, 0], array[1, 1, 1], array[2, 2, 2] = np.nan, np.inf, -np.inf
    path = save(tmp_path / "nan.nii.gz", array)
    with pytest.raises(BadFilesError, match=r'nan\.nii\.gz: 3 of 210 .*nonfinite="zero"'):
        data.check(data.samples(path))
    filled = data.check(data.samples(path, nonfinite="zero", window=(0, 1)))
    assert filled[0].load()[5, 4, 0] == 0
    with pytest.raises(InputError, match=r"nan\.nii\.gz: 3 of 210"):
        data.volume(save(tmp_path / "a.nii.gz", voxels()), mask=path).samples()


@pytest.mark.parametrize("nonfinite", ["error", "zero"])
def test_a_constant_volume_is_refused(tmp_path: Path, nonfinite: str) -> None:
    value = 3 if nonfinite == "error" else np.nan
    path = save(tmp_path / "flat.nii", np.full(SHAPE, value, np.float32))
    with pytest.raises(BadFilesError, match=r"flat\.nii: every voxel is [30]; the volume is blank"):
        data.check(data.samples(path, nonfinite=nonfinite))


@pytest.mark.parametrize("options", [{"window": (2000, 3000)}, {"percentiles": (0.5, 50)}])
def test_a_window_without_contrast_is_refused(
    tmp_path: Path, options: dict[str, tuple[float, float]]
) -> None:
    array = np.zeros(SHAPE, np.float32)
    array[0, 0, 0] = 1
    with pytest.raises(InputError, match=r"a\.nii: no contrast between .* choose another window"):
        data.volume(save(tmp_path / "a.nii", array), **options).pixels(0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": "oblique"}, "axis 'oblique': one of 'sagittal', 'coronal', 'axial' or 2, 1, 0"),
        ({"axis": 3}, "axis 3"),
        ({"window": (5, 5)}, r"window \(5, 5\)"),
        ({"window": (0, np.inf)}, r"window \(0, inf\)"),
        ({"percentiles": (99, 1)}, r"percentiles \(99, 1\)"),
        ({"nonfinite": "ignore"}, "nonfinite 'ignore': one of 'error', 'zero'"),
    ],
)
def test_arguments_outside_their_range(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.volume(save(tmp_path / "a.nii", voxels()), **options)  # type: ignore[arg-type]


def test_masks_that_do_not_lie_on_the_volume(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", voxels())
    for name, array, matrix, message in (
        ("shape.nii", voxels((5, 6, 8)), affine("RAS"), r"shape \(5, 6, 8\) is not that of"),
        ("flipped.nii", voxels(), affine("LAS"), "its affine is not that of"),
    ):
        with pytest.raises(InputError, match=rf"{name}: {message}"):
            data.volume(path, mask=save(tmp_path / name, array, matrix))
    with pytest.raises(InputError, match=r"absent\.nii: no such file"):
        data.volume(path, mask=tmp_path / "absent.nii")


@pytest.fixture
def stack(tmp_path: Path) -> Volume:
    return data.volume(save(tmp_path / "a.nii", voxels()))


@pytest.mark.parametrize(
    ("shape", "indices", "name", "message"),
    [
        ((6, 6, 5), None, "map.nii", r"maps of shape \(6, 6, 5\), and the slices need \(7, 6, 5\)"),
        ((7, 5, 6), None, "map.nii", r"maps of shape \(7, 5, 6\)"),
        ((0, 6, 5), None, "map.nii", "maps of shape"),
        ((1, 6, 5), [7], "map.nii", r"slices \[7\]; each is one of 0\.\.6"),
        ((2, 6, 5), [3, 3], "map.nii", r"slices \[3, 3\]"),
        ((7, 6, 5), None, "map.png", r"map\.png: the name of a map volume ends in \.nii or \.nii\.gz"),
    ],
)
def test_maps_that_do_not_fit_are_refused(
    stack: Volume, tmp_path: Path, shape: tuple[int, ...], indices: list[int] | None, name: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        stack.write(np.zeros(shape), tmp_path / name, indices)
    assert not (tmp_path / name).exists()


def test_a_folder_that_cannot_be_written_to(stack: Volume, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"map\.nii: cannot be written"):
        stack.write(np.zeros(stack.stack_shape), tmp_path / "file" / "map.nii")


def test_only_two_volumes_stay_in_memory(tmp_path: Path) -> None:
    nifti._pixels.cache_clear()
    for i in range(5):
        save(tmp_path / f"{i}.nii", voxels(seed=i))
    for sample in data.samples(tmp_path):
        sample.load()
    info = nifti._pixels.cache_info()
    assert (info.currsize, info.misses) == (2, 5)


def test_a_file_that_changed_since_is_refused(stack: Volume, tmp_path: Path) -> None:
    save(stack.path, voxels((5, 6, 8)))
    with pytest.raises(InputError, match="changed its shape since it was opened"):
        stack.pixels(0)
