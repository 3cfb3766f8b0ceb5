from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinofast.errors import InputError
from dinofast.files import check_writable, replacing


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.nii.gz"
    for text in ("old", "new"):
        with replacing(path) as temporary:
            temporary.write_text(text)
            assert temporary.name.endswith(".nii.gz")
            assert path.exists() == (text == "new")
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_new_file_has_the_mode_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("new")
    finally:
        assert os.umask(before) == umask
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(mode)
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", mode)


@pytest.mark.parametrize("name", ["a" * 248 + ".nii.gz", "ü" * 127, "x." + "b" * 253, "a.nii." + "ü" * 120])
def test_every_name_that_a_file_can_have_is_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with replacing(path) as temporary:
        temporary.write_text("whole")
        assert temporary.name[-7:] == name[-7:] or "." not in name
    assert path.read_text() == "whole"


def test_an_error_of_another_file_is_not_blamed_on_the_target(tmp_path: Path) -> None:
    def copy(source: Path, target: Path) -> None:
        with replacing(target) as temporary:
            temporary.write_bytes(source.read_bytes())

    with pytest.raises(FileNotFoundError, match="absent"):
        copy(tmp_path / "absent", tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError("cannot identify image"), TimeoutError(110, "timed out")])
def test_an_error_that_names_no_file_is_not_blamed_on_the_target(tmp_path: Path, error: OSError) -> None:
    def fail() -> None:
        with replacing(tmp_path / "a.txt"):
            raise error

    with pytest.raises(type(error), match=str(error.args[-1])) as caught:
        fail()
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opened", [Path.read_bytes, lambda path: os.open(path, os.O_WRONLY)])
def test_a_temporary_file_that_cannot_be_opened_is_the_targets_error(
    tmp_path: Path, opened: Callable[[Path], object]
) -> None:
    def write() -> None:
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.unlink()
            temporary.mkdir()
            try:
                opened(temporary)
            finally:
                temporary.rmdir()

    with pytest.raises(InputError, match=r"a\.txt: cannot be written \(Is a directory\)"):
        write()


def test_a_name_that_is_too_long_stops_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="File name too long"), replacing(tmp_path / ("a" * 256)):
        raise AssertionError("the block must not run")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(28, "No space left on device")])
def test_a_block_that_fails_changes_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(InputError if isinstance(error, OSError) else error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_while_the_file_is_made_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened, made = tmp_path / "a.txt", os.open, []
    path.write_text("old")

    def stopped(name: Any, *args: Any) -> int:
        os.close(opened(name, *args))
        made.append(Path(name).is_file())
        raise KeyboardInterrupt

    def write() -> None:
        with replacing(path):
            raise AssertionError("the block must not run")

    monkeypatch.setattr(os, "open", stopped)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert made == [True]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_no_file_can_have_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def write(path: Path) -> None:
        with replacing(path) as temporary:
            temporary.write_text("whole")

    for path, reason in (
        (Path("a" * 300), "File name too long"),
        (tmp_path, "Is a directory"),
        (Path(), ".+"),
    ):
        with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: cannot be written \({reason}\)"):
            write(path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "a.txt", tmp_path / "file" / "deep" / "a.txt", tmp_path):
        with pytest.raises(InputError, match=rf"{path}: cannot be written \(.*Choose a folder"):
            check_writable(path)
    check_writable(tmp_path / "new" / "a.txt")
    check_writable(tmp_path / "file")
    assert list((tmp_path / "new").iterdir()) == []
    assert (tmp_path / "file").read_text() == "in the way"
