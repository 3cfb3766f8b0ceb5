"""Torch files of others, torn in every place: the error names the file."""

import io

import pytest
import torch

from dinofast.errors import ArtifactError, InputError
from dinofast.models import foreign, raster_checkpoint, zero_shot_checkpoint


@pytest.fixture(scope="module", params=[True, False], ids=["zip", "old"])
def whole(request):
    file = io.BytesIO()
    torch.save({"a": torch.ones(2, 3)}, file, _use_new_zipfile_serialization=request.param)
    return file.getvalue()


@pytest.mark.parametrize("read", [raster_checkpoint.read, zero_shot_checkpoint.read])
def test_torn_files_are_named(tmp_path, whole, read):
    path = tmp_path / "torn.pth"
    for keep in range(0, len(whole), 7):
        path.write_bytes(whole[:keep])
        with pytest.raises(ArtifactError, match=r"torn\.pth: "):
            read(path)


@pytest.mark.parametrize("content", [b"I1\n.", b"\x80\x02K", b"\x80\x02h\x05.", b"0.", b"]", b"\x80\x02."])
def test_foreign_files_are_named(tmp_path, content):
    path = tmp_path / "other.pth"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"other\.pth: torn, or not a torch file"):
        foreign.load(path)


def test_files_that_may_not_be_read_are_told(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    path.write_bytes(b"")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", refuse)
    for read in (raster_checkpoint.read, zero_shot_checkpoint.read):
        with pytest.raises(InputError, match="may not be read; check its permissions"):
            read(path)
    with pytest.raises(InputError, match="is a folder"):
        foreign.load(tmp_path)
