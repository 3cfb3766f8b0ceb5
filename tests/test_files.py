from __future__ import annotations

import os
import re
import stat
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
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600


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
