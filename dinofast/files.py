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


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it over `path` when the block ends without an error.

    The temporary file is removed whenever the block fails, Ctrl-C included, and what stood at `path`
    before stays as it was. Parent folders are made.

    Args:
        path: where the finished file shall stand.

    Yields:
        Path to write to; it keeps every suffix of `path`, so writers that look at suffixes are content.

    Raises:
        InputError: the folder cannot be made or written to, or the disk is full.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with replacing(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> (folder / "a.txt").read_text(), len(list(folder.iterdir()))
    ('whole', 1)
    """
    target = Path(path)
    temporary = target.parent / f".writing-{secrets.token_hex(8)}-{target.name}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:  # around its making too: Ctrl-C may come when the file is there and the call has not returned
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise now what `replacing` would raise after the work; parent folders are made, no file is.

    Raises:
        InputError: the folder cannot be made or written to, or `path` is a folder.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError) -> InputError:
    return InputError(
        f"{target}: cannot be written ({error.strerror or error}); nothing was changed there. "
        "Choose a folder that exists, is writable and has space."
    )
