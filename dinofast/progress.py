"""Progress, shown only when asked for: what long calls report to, and its picture in a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from dinofast.errors import InputError

Progress = Callable[[str, int, "int | None"], None]
"""Called as progress(stage, done, total): a name for people, how many are done, of how many if known."""


@contextmanager
def rich_progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """Give a callback that draws one bar a stage; stages may follow each other or interleave.

    Where the stream is no terminal, each stage prints a line when it starts and one when it ends, the
    latter also for a stage that an error or Ctrl-C stopped.

    Args:
        stream: where to draw; None draws on stderr, so that stdout stays for results.

    Yields:
        Callback; `done` never needs to reach `total`, and a total may become known late.

    Raises:
        InputError: rich is missing.

    >>> with rich_progress(sys.stdout) as progress:
    ...     progress("score", 0, 2)
    ...     progress("score", 2, 2)  # doctest: +ELLIPSIS
    score: 2 to do
    score: 2 of 2 in ... s
    """
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars
    except ImportError as error:
        raise InputError("progress bars need rich: pip install 'dinofast[cli]'") from error
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        with _lines(stream) as progress:
            yield progress
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks = {}
    with Bars(*columns, console=Console(file=stream)) as bars:

        def draw(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield draw


@contextmanager
def _lines(stream: TextIO) -> Iterator[Progress]:
    started: dict[str, float] = {}
    latest: dict[str, tuple[int, int | None]] = {}

    def end(stage: str) -> None:
        done, total = latest.pop(stage)
        count = f"{done}" if total is None else f"{done} of {total}"
        print(f"{stage}: {count} in {time.monotonic() - started.pop(stage):.1f} s", file=stream, flush=True)

    def write(stage: str, done: int, total: int | None) -> None:
        if stage not in started:
            started[stage] = time.monotonic()
            print(
                f"{stage}: started" if total is None else f"{stage}: {total} to do", file=stream, flush=True
            )
        latest[stage] = done, total
        if total is not None and done >= total:
            end(stage)

    try:
        yield write
    finally:
        for stage in list(latest):
            end(stage)
