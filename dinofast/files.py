"""Writing files so that a full disk, a crash or Ctrl-C never leaves half of one."""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinofast.errors import InputError

LONGEST = 48
"""Characters of the suffixes that a temporary name keeps, so that it is no longer than names may be."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of writing that name no file."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it over `path` when the block ends without an error.

    The temporary file is removed whenever the block fails, Ctrl-C included, and what stood at `path`
    before stays as it was. Parent folders are made. The finished file has the permissions of the one that it
    replaces, or those of any new file.

    Args:
        path: where the finished file shall stand.

    Yields:
        Path to write to; it keeps the suffixes of `path`, so writers that look at suffixes are content.

    Raises:
        InputError: the folder cannot be made or written to, or the disk is full. Other errors of the block,
            those of reading another file included, go on as they are.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with replacing(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> (folder / "a.txt").read_text(), len(list(folder.iterdir()))
    ('whole', 1)
    """
    target = Path(path)
    endings = "".join(target.suffixes)[-LONGEST:]
    temporary = target.parent / f".writing-{secrets.token_hex(8)}{endings}"
    with _errors_of(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = _mode(target)
    try:  # around its making too: Ctrl-C may come when the file is there and the call has not returned
        with _errors_of(target):
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        try:
            yield temporary
        except OSError as error:
            unnamed = error.filename is None and error.errno in FULL
            if unnamed or str(error.filename) == str(temporary):
                raise _unwritable(target, error) from error
            raise
        with _errors_of(target):
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.chmod(mode)
            temporary.replace(target)
    finally:
        with _errors_of(target):
            temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise now what `replacing` would raise after the work; parent folders are made, no file is.

    Raises:
        InputError: the folder cannot be made or written to, or `path` is a folder.
    """
    target = Path(path)
    with _errors_of(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def _mode(target: Path) -> int:
    """Give the permissions that the finished file gets: those of the one it replaces, else by the umask."""
    try:
        return target.stat().st_mode & 0o777
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask


@contextmanager
def _errors_of(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError) -> InputError:
    return InputError(
        f"{target}: cannot be written ({error.strerror or error}); nothing was changed there. "
        "Choose a folder that exists, is writable and has space."
    )
