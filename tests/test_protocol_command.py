"""The command that runs the BMAD protocol."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from command_line import LITE, Call

from dinofast.scoreboard import Report

# The command line


@pytest.fixture
def call(call: Call) -> Call:
    """Run the protocol's command."""
    return partial(call, "evaluate", "--protocol", "bmad")


def test_the_command_writes_the_whole_report(call: Call, brain: Path, report: Report, tmp_path: Path) -> None:
    out, saved, again = tmp_path / "a.json", tmp_path / "d.safetensors", tmp_path / "b.json"
    first = call(brain, "memory_bank", *LITE, "--out", out, "--save", saved, "--json")
    assert (first.code, first.err) == (0, "")
    found = json.loads(first.out)
    assert json.loads(out.read_text()) == found
    assert found["protocol"] == "bmad"
    assert found["pixel"]["auroc"] == pytest.approx(report.pixel.auroc, abs=1e-6)
    assert found["pro"]["value"] == pytest.approx(report.pro.value, abs=1e-4)  # type: ignore[union-attr]
    assert found["published"][0]["method"] == "AnomalyDINO, full bank"
    assert len(found["images"]) == 5

    second = call(brain, saved, "--against", out, "--out", again, "--json")
    assert second.code == 0
    tested = json.loads(again.read_text())
    assert tested["against"]["auroc"]["p_value"] == tested["against"]["aupr"]["p_value"] == 1
    assert tested["against"]["auroc"]["n_pairs"] == 3
    assert tested["against"]["auroc"]["n_permutations"] == 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json", "d.safetensors"}


def test_the_command_for_people(call: Call, brain: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    assert call(brain, "memory_bank", *LITE, "--out", out).code == 0
    options = ("--param", "n_neighbors=2", "--thresholds", "patch", "--shots", 2, "--against", out)
    found = call(brain, "memory_bank", *LITE, *options)
    assert found.code == 0
    head, measured, *_ = [line for line in found.out.splitlines() if line[:1] in "┃│"]
    assert [cell.strip() for cell in head.strip("┃").split("┃")] == [
        "method", "AUROC", "AUPR", "Dice@10%", "Dice@5%", "Dice@1%", "source",
    ]  # fmt: skip
    assert measured.startswith("│ this run ")
    row = next(line for line in found.out.splitlines() if line.startswith("│ DPMM  "))
    measured_auroc = float(measured.split("│")[2])
    assert f"96.21 ({measured_auroc - 96.21:+.2f})" in row
    assert "MemoryBank(n_neighbors=2)" in found.out
    assert "Thresholds from the patch scores of 3 normal validation images" in " ".join(found.out.split())
    assert "Paired permutation test" in found.out
    assert "source DPMM: Schulthess & Konukoglu" in found.out
    assert "note: the counts differ from BMAD's: train/good 3 for 7500" in found.out
    assert "images learned, scored" in found.out
    assert "│ 2, 5" in found.out


def test_runs_that_cannot_be_compared(call: Call, brain: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    assert call(brain, "memory_bank", *LITE, "--out", out, "--no-regions", "--json").code == 0
    other = call(brain, "memory_bank", *LITE, "--against", out, "--map-size", "240")
    assert (other.code, other.out) == (1, "")
    assert "the runs differ in map_size, '240' and 'native'" in other.err
    assert "check:" not in other.err
    changed = json.loads(out.read_text())
    changed["images"][0]["source"] = "test/good/img/other.png"
    out.write_text(json.dumps(changed))
    late = call(brain, "memory_bank", *LITE, "--against", out, "--out", tmp_path / "b.json", "--json")
    assert late.code == 1
    assert "2 images are in one run only, test/good/img/00009_60.png among them" in late.err
    assert json.loads(late.out) == json.loads((tmp_path / "b.json").read_text())
    unset = json.dumps({name: value for name, value in changed.items() if name != "set"})
    loose = json.dumps(changed | {"settings": {}})
    foreign = "is not a report of this protocol"
    for text, message in (("{}", foreign), ("{", "is not JSON"), (unset, foreign), (loose, foreign)):
        out.write_text(text)
        assert message in call(brain, "memory_bank", *LITE, "--against", out).err
    assert "cannot be read (No such file" in call(brain, "memory_bank", *LITE, "--against", "absent.json").err


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("absent", "memory_bank", *LITE), 1, "absent: no such folder; give the one that holds train"),
        ((".", "foo", *LITE), 1, "unknown model 'foo'"),
        ((".", "memory_bank", *LITE, "--masks", "128"), 1, "mask rule '128': one of any, 255"),
        ((".", "memory_bank", *LITE, "--map-size", "1"), 1, "map size '1': one of native, 240, 224"),
        ((".", "memory_bank", *LITE, "--set", "heart"), 1, "set 'heart': one of brain, liver, resc"),
        ((".", "absent.safetensors"), 1, "absent.safetensors: no such file"),
        ((".", "memory_bank", *LITE, "--out", "."), 1, ".: cannot be written"),
        ((".", "d.safetensors", "--param", "n_neighbors=2", "--shots", "1"), 2, "--param, --shots: "),
        ((".", "memory_bank", "--split", "test"), 2, "--split"),
        ((".", "memory_bank", "--layers", "a"), 2, "--layers"),
    ],
)
def test_what_the_command_refuses(
    call: Call,
    brain: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(brain)
    monkeypatch.setenv("COLUMNS", "200")
    found = call(*args)
    assert (found.code, found.out) == (code, "")
    assert message in found.err
    assert "Traceback" not in found.err
