from __future__ import annotations

import io
import re
import sys

import pytest

from dinofast.errors import InputError
from dinofast.progress import rich_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def without_times(stream):
    return re.sub(r"\d+\.\d s", "T s", stream.getvalue()).splitlines()


def test_only_start_and_end_lines_without_a_terminal():
    stream = io.StringIO()
    with rich_progress(stream) as progress:
        for done in range(101):
            progress("score", done, 100)
        for done in range(1, 8):
            progress("read [a]", done, None)
            progress("other", done, 9)
    assert without_times(stream) == [
        "score: 100 to do",
        "score: 100 of 100 in T s",
        "read [a]: started",
        "other: 9 to do",
        "read [a]: 7 in T s",
        "other: 7 of 9 in T s",
    ]


def test_a_stage_may_run_again():
    stream = io.StringIO()
    with rich_progress(stream) as progress:
        for _ in range(2):
            progress("fold", 0, 1)
            progress("fold", 1, 1)
    assert without_times(stream) == ["fold: 1 to do", "fold: 1 of 1 in T s"] * 2


def test_a_stopped_stage_says_how_far_it_came():
    stream = io.StringIO()

    def stopped():
        with rich_progress(stream) as progress:
            progress("score", 3, 10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert without_times(stream) == ["score: 10 to do", "score: 3 of 10 in T s"]


def test_bars_in_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with rich_progress(stream) as progress:
        progress("read [bold]", 1, None)
        progress("score", 0, 2)
        progress("score", 2, 2)
        progress("read [bold]", 3, 3)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert re.search(r"read \[bold\].*3/3", drawn)
    assert re.search(r"score.*2/2", drawn)
    assert "to do" not in drawn


def test_stderr_is_the_default(capsys):
    with rich_progress() as progress:
        progress("score", 1, 1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("score: 1 to do\nscore: 1 of 1 in ")


def test_nothing_is_shown_when_nothing_happens():
    stream = io.StringIO()
    with rich_progress(stream):
        pass
    assert stream.getvalue() == ""


def test_missing_rich_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(InputError, match=r"pip install 'dinofast\[cli\]'"), rich_progress():
        raise AssertionError("not reached")
