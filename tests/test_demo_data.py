from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import requests
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SegmentationStorage, generate_uid
from pypi_simple import PyPISimple

from dinofast import data
from dinofast.data import demo, dicom, fetch, rider
from dinofast.data.fetch import Archive, cache, download, extract
from dinofast.errors import InputError

# Brain


def test_the_embedded_voxels_are_those_of_the_source() -> None:
    image = nibabel.load(demo.ASSETS / "brain1_image.nii.gz")
    label = nibabel.load(demo.ASSETS / "brain1_label.nii.gz")
    assert np.asarray(image.dataobj).sum(dtype=np.int64) == 631859459
    assert np.asarray(label.dataobj).sum(dtype=np.int64) == 4137
    assert image.get_data_dtype() == np.int16
    # the NRRD header: LPS, directions (0.78125, -0.78125, 6.5), origin (-99.609375, 99.609375, -78)
    expected = np.diag([-0.78125, 0.78125, 6.5, 1])
    expected[:3, 3] = (99.609375, -99.609375, -78)
    np.testing.assert_array_equal(image.affine, expected)
    np.testing.assert_array_equal(label.affine, expected)
    assert nibabel.aff2axcodes(image.affine) == ("L", "A", "S")


def test_brain_fits_on_lesion_free_slices_and_tests_the_others() -> None:
    brain = demo.load("brain")
    truth = [s.mask() for s in brain.test]
    assert sum(int(m.sum()) for m in truth if m is not None) == 4137
    assert [s.volume.index for s in brain.test if s.volume] == list(range(11, 18))
    assert len(brain.fit) == 18
    assert {s.label for s in brain.fit} == {0}
    assert {s.label for s in brain.test} == {1}
    assert data.check(brain.fit) == brain.fit
    assert min(int(s.load().max()) for s in brain.fit) == 255
    assert brain.region(brain.test[0]) is None
    assert "neighbors in one volume" in brain.note
    assert brain.license == "BSD-3-Clause"
    assert "Harvard Medical School" in (demo.ASSETS / "LICENSE-pyradiomics.txt").read_text()


def test_brain_maps_lie_on_the_label(tmp_path: Path) -> None:
    brain = demo.brain()
    maps = np.stack([s.mask() for s in brain.test])  # type: ignore[arg-type]
    brain.volume.write(maps, tmp_path / "map.nii.gz", [s.volume.index for s in brain.test if s.volume])
    label = nibabel.load(demo.ASSETS / "brain1_label.nii.gz")
    written = nibabel.load(tmp_path / "map.nii.gz")
    np.testing.assert_array_equal(written.get_fdata(), label.get_fdata())
    np.testing.assert_array_equal(written.affine, label.affine)


def test_unknown_sets_and_foreign_samples_are_refused() -> None:
    with pytest.raises(InputError, match="demo set 'liver': one of brain, lung-ct"):
        demo.load("liver")
    (foreign,) = data.samples(np.eye(4, dtype=np.uint8))
    with pytest.raises(InputError, match="array: is no slice of the demo set 'brain'"):
        demo.brain().region(foreign)


# Archives

CONTENT = b"archive"
PINNED = Archive("project", "project-1.0.tar.gz", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    state: dict[str, Any] = {"files": ["project-0.9.tar.gz", PINNED.filename], "content": CONTENT}

    def page(self: PyPISimple, project: str, **_: Any) -> Any:
        return SimpleNamespace(packages=[SimpleNamespace(filename=name) for name in state["files"]])

    def fetch(self: PyPISimple, package: Any, path: Path, progress: Any, **_: Any) -> None:
        assert package.filename == PINNED.filename
        with progress(None) as tracker:
            path.write_bytes(state["content"])
            for _ in state["content"]:
                tracker.update(1)

    monkeypatch.setattr(PyPISimple, "get_project_page", page)
    monkeypatch.setattr(PyPISimple, "download_package", fetch)
    return state


def test_download_compares_the_hash_and_reports_progress(index: dict[str, Any], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    download(PINNED, tmp_path / "a", lambda done, total: seen.append((done, total)))
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert seen == [(i, 7) for i in range(1, 8)]
    index["content"] = b"archivE"
    with pytest.raises(
        InputError, match=rf"project-1\.0\.tar\.gz: its sha256 is .* and {PINNED.sha256} is pinned"
    ):
        download(PINNED, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    index["files"].pop()
    with pytest.raises(InputError, match="the package index no longer has it"):
        download(PINNED, tmp_path / "c")


def test_without_network_the_error_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise requests.ConnectionError("unreachable")

    monkeypatch.setattr(requests.Session, "request", offline)
    monkeypatch.setenv("DINOFAST_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"cannot be reached \(ConnectionError\).*'brain' is embedded"):
        demo.lung_ct()
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_interrupted_download_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(archive: Archive, path: Path, progress: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "download", interrupted)
    monkeypatch.setenv("DINOFAST_CACHE", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        demo.lung_ct()
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DINOFAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"file: cannot be written .*DINOFAST_CACHE"):
        demo.lung_ct()


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DINOFAST_CACHE", raising=False)
    assert cache() == tmp_path / "dinofast"
    monkeypatch.setenv("DINOFAST_CACHE", str(tmp_path / "own"))
    assert cache() == tmp_path / "own"


def archive(path: Path, members: list[tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            member.size = 3 if member.isreg() else 0
            tar.addfile(member, io.BytesIO(b"abc") if member.isreg() else None)
    return path


def test_only_wanted_members_are_unpacked(tmp_path: Path) -> None:
    names = ["p/data/1.dcm", "p/data/LICENSE", "p/setup.py", "../outside.py"]
    path = archive(tmp_path / "a.tar.gz", [tarfile.TarInfo(name) for name in names])
    out = tmp_path / "out"
    assert extract(path, ["*/data/*"], out) == [out / "p/data/1.dcm", out / "p/data/LICENSE"]
    assert [p.name for p in sorted(out.rglob("*")) if p.is_file()] == ["1.dcm", "LICENSE"]
    assert not (tmp_path / "outside.py").exists()
    with pytest.raises(InputError, match=r"a\.tar\.gz: no member matches \*\.png"):
        extract(path, ["*.png"], out)


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("p/data/../../../evil"),
        tarfile.TarInfo("/evil/data/evil"),
        link("p/data/evil", "../../../evil", tarfile.SYMTYPE),
        link("p/data/evil", "/etc/passwd", tarfile.LNKTYPE),
        link("p/data/evil", "", tarfile.FIFOTYPE),
    ],
    ids=["dots", "absolute", "symlink", "hardlink", "fifo"],
)
def test_members_that_leave_the_folder_are_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    path = archive(tmp_path / "a.tar.gz", [member])
    with pytest.raises(InputError, match="is a link or leaves its folder"):
        extract(path, ["*/data/*"], tmp_path / "deep" / "out")
    assert [p for p in tmp_path.rglob("*") if p.name == "evil"] == []


def test_a_torn_archive_is_named(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar.gz", [tarfile.TarInfo(f"p/data/{i}") for i in range(99)])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"a\.tar\.gz: cannot be unpacked"):
        extract(path, ["*/data/*"], tmp_path / "out")


# DICOM

SERIES = "1.2.826.0.1.3680043.8.498.7"
TILT = ([0.0, 1.0, 0.0], [0.0, 0.0, -1.0])  # rows run to the back, columns down: slices along −x in LPS


def slice_uid(z: int) -> str:
    return f"{SERIES}.{z}"


def dataset(path: Path, sop_class: str, uid: str, pixels: np.ndarray[Any, Any], bits: int) -> Dataset:
    item = Dataset()
    item.file_meta = FileMetaDataset()
    item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item.file_meta.MediaStorageSOPClassUID = sop_class
    item.file_meta.MediaStorageSOPInstanceUID = uid
    item.SOPClassUID, item.SOPInstanceUID = sop_class, uid
    item.Rows, item.Columns = pixels.shape[-2:]
    item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
    item.BitsAllocated = item.BitsStored = bits
    item.HighBit = bits - 1
    item.PixelRepresentation = int(bits == 16)
    raw = np.packbits(pixels.ravel(), bitorder="little").tobytes() if bits == 1 else pixels.tobytes()
    item.PixelData = raw + b"\0" * (len(raw) % 2)
    item["PixelData"].VR = "OW" if bits == 16 else "OB"
    path.parent.mkdir(parents=True, exist_ok=True)
    return item


def write_slice(path: Path, z: int, pixels: np.ndarray[Any, Any], place: list[float], **changes: Any) -> Path:
    item = dataset(path, CTImageStorage, slice_uid(z), pixels.astype(np.int16), 16)
    item.Modality, item.SeriesInstanceUID = "CT", SERIES
    item.ImageOrientationPatient = [*TILT[0], *TILT[1]]
    item.ImagePositionPatient, item.PixelSpacing = place, [0.5, 0.75]
    item.RescaleSlope, item.RescaleIntercept = 1, -1024
    for key, value in changes.items():
        setattr(item, key, value)
    item.save_as(path, enforce_file_format=True)
    return path


def series(folder: Path, **changes: Any) -> tuple[list[Path], np.ndarray[Any, Any]]:
    stored = np.random.default_rng(0).integers(0, 2000, (4, 6, 5))
    stored[0, 0, 0] = -2000
    files = [
        write_slice(
            folder / f"{name}.dcm", z, stored[z], [10 - 2.0 * z, 20, 30], **(changes if z == 2 else {})
        )
        for name, z in (("a", 2), ("b", 0), ("c", 3), ("d", 1))
    ]
    return files, stored


def test_a_series_is_sorted_scaled_and_placed(tmp_path: Path) -> None:
    files, stored = series(tmp_path)
    image, affine, uids = dicom.read_series(files)
    assert image.shape == (5, 6, 4)
    assert image.dtype == np.int16
    assert uids == [slice_uid(z) for z in range(4)]
    np.testing.assert_array_equal(image, np.maximum(stored.transpose(2, 1, 0) - 1024, -1024))
    # voxel (column 1, row 2, slice 3) in LPS: place of slice 3 + 1·0.75 along the row + 2·0.5 down the column
    lps = np.array([10 - 6.0, 20 + 0.75, 30 - 1.0])
    np.testing.assert_allclose(affine @ (1, 2, 3, 1), [-lps[0], -lps[1], lps[2], 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Modality": "MR"}, r"a\.dcm: modality MR, not CT"),
        ({"SeriesInstanceUID": "1.2.3"}, r"its SeriesInstanceUID is not that of"),
        ({"PixelSpacing": [0.5, 0.5]}, r"its PixelSpacing is not that of"),
        ({"ImagePositionPatient": [5, 20, 30]}, "not evenly spaced; one is missing or doubled"),
        ({"ImagePositionPatient": [8, 20, 30]}, "not evenly spaced"),
    ],
)
def test_a_series_that_is_none_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dicom.read_series(series(tmp_path, **changes)[0])


def test_files_that_are_no_dicom_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"text" * 100)
    with pytest.raises(InputError, match=r"a\.dcm: not a DICOM file, or truncated"):
        dicom.read_series([tmp_path / "a.dcm"])
    with pytest.raises(InputError, match="0 DICOM slices"):
        dicom.read_series([])


def segmentation(path: Path, uids: list[str]) -> np.ndarray[Any, Any]:
    frames = np.random.default_rng(1).integers(0, 2, (2 * len(uids), 6, 5), np.uint8)
    item = dataset(path, SegmentationStorage, generate_uid(), frames, 1)
    item.NumberOfFrames = len(frames)
    item.SegmentSequence = pydicom.Sequence()
    item.PerFrameFunctionalGroupsSequence = pydicom.Sequence()
    for number, how in ((1, "MANUAL"), (2, "AUTOMATIC")):
        segment = Dataset()
        segment.SegmentNumber, segment.SegmentLabel, segment.SegmentAlgorithmType = number, "Tumor", how
        item.SegmentSequence.append(segment)
        for uid in uids:
            group, which, source, image = Dataset(), Dataset(), Dataset(), Dataset()
            which.ReferencedSegmentNumber = number
            image.ReferencedSOPInstanceUID = uid
            source.SourceImageSequence = [image]
            group.SegmentIdentificationSequence, group.DerivationImageSequence = [which], [source]
            item.PerFrameFunctionalGroupsSequence.append(group)
    item.save_as(path, enforce_file_format=True)
    return frames


def test_a_segment_is_matched_to_its_slices_by_uid(tmp_path: Path) -> None:
    uids = [slice_uid(z) for z in range(4)]
    frames = segmentation(tmp_path / "seg.dcm", [uids[3], uids[1]])
    found = dicom.read_segment(tmp_path / "seg.dcm", uids, (5, 6), label="Tumor", algorithm="MANUAL")
    assert found.shape == (5, 6, 4)
    np.testing.assert_array_equal(found[..., 3], frames[0].T)
    np.testing.assert_array_equal(found[..., 1], frames[1].T)
    assert not found[..., [0, 2]].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "Liver"}, "has 0 segments 'Liver' made MANUAL"),
        ({"size": (6, 5)}, r"frames of \(5, 6\) do not fit slices of \(6, 5\)"),
        ({"uids": ["1.2.3"]}, "which is no slice of the series"),
    ],
)
def test_a_segment_of_another_scan_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    uids = [slice_uid(z) for z in range(4)]
    segmentation(tmp_path / "seg.dcm", uids)
    options: dict[str, Any] = {
        "uids": uids,
        "size": (5, 6),
        "label": "Tumor",
        "algorithm": "MANUAL",
        **changes,
    }
    with pytest.raises(InputError, match=message):
        dicom.read_segment(tmp_path / "seg.dcm", **options)


# Lung


def test_the_body_is_tissue_and_what_it_encloses() -> None:
    image = np.full((60, 60, 2), -1000, np.int16)
    image[10:50, 10:50, 0] = 40
    image[20:30, 20:40, 0] = -800  # lung
    image[5:55, 55, 0] = 300  # table
    expected = np.zeros(image.shape, np.uint8)
    expected[10:50, 10:50, 0] = 1
    np.testing.assert_array_equal(rider.body(image), expected)


@pytest.mark.network
@pytest.mark.slow
def test_lung_ct_is_the_scan_that_was_published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DINOFAST_CACHE", str(tmp_path))
    seen: list[tuple[int, int]] = []
    lung = demo.load("lung-ct", lambda done, total: seen.append((done, total)))
    assert seen[-1] == (rider.ARCHIVE.size, rider.ARCHIVE.size)
    folder = lung.volume.path.parent
    assert sorted(p.name for p in folder.iterdir()) == [
        "LICENSE.txt",
        "body.nii.gz",
        "image.nii.gz",
        "tumor.nii.gz",
    ]
    assert list(tmp_path.iterdir()) == [folder]
    assert "CC BY 4.0" in (folder / "LICENSE.txt").read_text()
    assert lung.volume.stack_shape == (236, 512, 512)

    truth = [s.mask() for s in lung.test]
    assert sum(int(m.sum()) for m in truth if m is not None) == 132507
    assert [s.volume.index for s in lung.test if s.volume] == list(range(146, 188))
    for sample, mask in zip(lung.test, truth, strict=True):
        inside = lung.region(sample)
        assert inside is not None
        assert mask is not None
        assert not (mask & ~inside).any()
        assert 0.5 < inside.mean() < 0.8
    places = [s.volume.index for s in lung.fit if s.volume]
    assert len(places) == 47
    calibration = [s.volume.index for s in lung.calibrate if s.volume]
    assert not set(places) & set(calibration)
    assert all(i < 142 or i > 191 for i in places + calibration)

    def offline(*_: Any, **__: Any) -> Any:
        raise requests.ConnectionError("unreachable")

    monkeypatch.setattr(requests.Session, "request", offline)
    assert demo.lung_ct().test[0].load().shape == (512, 512, 3)
