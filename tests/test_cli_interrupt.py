"""Ctrl-C in the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, whole
from PIL import Image
from textures import save, scan, weave


def interrupted(
    args: list[object], ready: Callable[[str], bool], cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own and stop it as Ctrl-C does, once it is `ready` by its stderr."""
    command = [sys.executable, "-m", "dinofast.cli", *map(str, args)]
    log = cwd / "stderr.txt"
    with log.open("w") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, cwd=cwd)
        deadline = time.monotonic() + 120
        while not ready(log.read_text()):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out, log.read_text())


def check_interrupted(found: subprocess.CompletedProcess[str]) -> None:
    # Python dies of the signal itself where it came in a string's exec; shells call both 130
    assert found.returncode in (130, -signal.SIGINT), found.stderr
    assert found.stdout == ""
    assert found.stderr.rstrip().endswith(
        "dinofast: stopped; finished files are whole, nothing half-written is left"
    )
    assert "Traceback" not in found.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent there")
def test_ctrl_c_in_predict_leaves_whole_files_only(detector: Path, tmp_path: Path) -> None:
    for i in range(300):
        save(tmp_path / "in" / f"{i:03d}.png", weave(0))
    scan(tmp_path / "in" / "last.nii.gz")
    out = tmp_path / "out"
    found = interrupted(
        ["predict", detector, tmp_path / "in", "--out", out, "--batch-size", 1],
        lambda _: out.is_dir() and len(list(out.glob("*_map.tif"))) >= 3,
        tmp_path,
    )
    check_interrupted(found)
    rows = json.loads((out / "scores.json").read_text())
    assert 2 <= len(rows) < 300  # a map may be there and its row not yet
    assert {"scores.json", *(row["map"] for row in rows)} <= {path.name for path in whole(out)}


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent there")
def test_ctrl_c_in_the_demo_leaves_whole_files_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ["demo", "--data", "brain", "--output", out, "--backbone", "efficientnet-lite0"]
    check_interrupted(interrupted(args, lambda log: "brain: calibrate: 36 to do" in log, tmp_path))
    assert [path.name for path in whole(out)] == ["report.html"]
    assert "was stopped" in (out / "report.html").read_text()


def test_ctrl_c_while_a_file_is_written(
    call: Call, detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(range(2))
    write = Image.Image.save

    def stopped(self: Image.Image, path: Any, *args: Any, **options: Any) -> None:
        if next(left, None) is None:
            Path(path).write_bytes(b"II*")
            raise KeyboardInterrupt
        write(self, path, *args, **options)

    files = [save(tmp_path / "in" / f"{i}.png", weave(i)) for i in range(5)]
    monkeypatch.setattr(Image.Image, "save", stopped)
    found = call("predict", detector, *files, "--out", tmp_path / "out")
    assert found.code == 130
    assert "nothing half-written is left" in found.err
    assert sorted(path.name for path in whole(tmp_path / "out")) == ["0_map.tif", "1_map.tif", "scores.json"]
    assert len(json.loads((tmp_path / "out" / "scores.json").read_text())) == 2
