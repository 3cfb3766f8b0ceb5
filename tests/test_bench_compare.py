"""Runs against saved runs: a real slowdown is named, noise and slow machines are not."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="bench/ is not beside the tests")
TIMES = {"dinofast": 2.0, "dinofast-lowp": 1.0, "torch": 3.0, "faiss": 4.0}


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import compare

    return compare


def run(seed, slower=None, machine=1.0, noise=0.02, groups=("knn a", "map b")):
    """A run of seven rounds; noise only ever adds time."""
    draw = np.random.default_rng(seed)
    entries = []
    for group in groups:
        for name, ms in TIMES.items():
            factor = machine * (slower or {}).get((group, name), 1.0)
            samples = ms * factor * (1 + draw.exponential(noise, 7))
            facts = {"contender": name, "samples_ms": samples.tolist(), "disturbed": False}
            entries.append({"group": group, "extra_info": facts})
    info = {"instruction_set": "avx512", "threads": 2, "cpu": {"brand_raw": "one"}}
    return {"benchmarks": entries, "machine_info": info}


def call(compare, capsys, tmp_path, saved, new):
    for name, content in (("saved.json", saved), ("new.json", new)):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return compare.main([str(tmp_path / "saved.json"), str(tmp_path / "new.json")]), capsys.readouterr().out


def test_ten_plain_reruns_raise_no_alarm_on_a_slower_machine_either(compare):
    saved = run(0)
    for seed in range(1, 11):
        for machine in (1.0, 1.7):
            assert not any(
                c.slower(compare.TOLERANCE) for c in compare.changes(saved, run(seed, None, machine))
            )


@pytest.mark.parametrize("seed", range(5))
def test_a_fifth_slower_is_named(compare, capsys, tmp_path, seed):
    new = run(seed + 20, {("map b", "dinofast-lowp"): 1.2}, machine=0.8)
    code, out = call(compare, capsys, tmp_path, run(0), new)
    assert code == 1
    [line] = [line for line in out.splitlines() if line.startswith("SLOWER")]
    assert "map b dinofast-lowp" in line
    assert out.splitlines()[-1] == "got slower; map b dinofast-lowp"


def test_one_peer_that_changed_is_not_ours(compare):
    new = run(1, {("knn a", "torch"): 0.5, ("map b", "faiss"): 1.5})
    growth = [c.growth for c in compare.changes(run(0), new)]
    assert not any(c.slower(0.5) for c in compare.changes(run(0), new)), growth


def test_noise_widens_what_passes(compare):
    shaken = copy.deepcopy(run(1, {("knn a", "dinofast"): 1.2}))
    for entry in shaken["benchmarks"]:
        entry["extra_info"]["samples_ms"] = [1.0 * s for s in np.array([1, 1.3, 1.6]) * 5]
    assert not any(c.slower(0.1) for c in compare.changes(shaken, shaken))
    assert all(c.error > 0.3 for c in compare.changes(shaken, shaken))


def test_what_cannot_be_compared_says_why(compare, capsys, tmp_path):
    other = run(1)
    other["machine_info"]["instruction_set"] = "avx2"
    cases = [
        (other, "instruction_set was avx512 in the saved run and is avx2"),
        (run(1, groups=("else",)), "no group with a peer in common"),
        ({"benchmarks": [{}]}, "no JSON of pytest bench"),
        ("torn{", "no JSON of pytest bench"),
    ]
    for new, reason in cases:
        code, out = call(compare, capsys, tmp_path, run(0), new)
        assert code == 2
        assert reason in out


def test_peers_that_disagree_widen_what_passes(compare):
    new = run(1, {("knn a", "dinofast"): 1.2, ("knn a", "torch"): 1.25, ("knn a", "faiss"): 0.8})
    [change] = [c for c in compare.changes(run(0), new) if c.name == "knn a dinofast"]
    assert change.error > 0.2
    assert not change.slower(0.1)


def test_another_version_of_a_peer_is_another_kind_of_run(compare):
    old, new = run(0), run(1)
    old["machine_info"]["versions"] = {"torch": "2.13", "dinofast": "0.1", "faiss-cpu": "1"}
    new["machine_info"]["versions"] = {"torch": "2.13", "dinofast": "0.2"}
    assert compare.comparable(old, new) is None
    new["machine_info"]["versions"]["torch"] = "2.14"
    assert compare.comparable(old, new) == "torch was 2.13 in the saved run and is 2.14"


def test_what_others_disturbed_is_judged_on_request_only(compare, capsys, tmp_path):
    new = run(1, {("map b", "dinofast"): 2.0})
    for entry in new["benchmarks"]:
        entry["extra_info"]["disturbed"] = entry["group"] == "map b"
    code, out = call(compare, capsys, tmp_path, run(0), new)
    assert code == 0
    assert out.count("unsure") == 2
    assert compare.main([str(tmp_path / "saved.json"), str(tmp_path / "new.json"), "--disturbed"]) == 1
    for entry in new["benchmarks"]:
        entry["extra_info"]["disturbed"] = True
    code, out = call(compare, capsys, tmp_path, run(0), new)
    assert code == 2
    assert "other processes disturbed every group" in out


def test_a_second_run_must_name_the_same_contender(compare, capsys, tmp_path):
    slow = {"a": ("knn a", "dinofast"), "b": ("map b", "dinofast"), "both": None}
    (tmp_path / "saved").write_text(json.dumps(run(0)))
    for name, key in slow.items():
        found = run(5, dict.fromkeys([key] if key else [slow["a"], slow["b"]], 1.4))
        (tmp_path / name).write_text(json.dumps(found))
    paths = {name: str(tmp_path / name) for name in ("saved", *slow)}
    assert compare.main([paths["saved"], paths["a"], paths["b"]]) == 0
    assert compare.main([paths["saved"], paths["a"], paths["both"]]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "got slower; knn a dinofast"


SLOW = {("map b", "dinofast"): 1.5}


@pytest.mark.skipif(not (ROOT / ".ci" / "bench").exists(), reason=".ci/bench is not beside the tests")
@pytest.mark.parametrize(
    ("saved", "new", "code", "said"),
    [
        ([run(0)], [run(1)], 0, "none got slower"),
        ([run(0)], [run(1, SLOW), run(2)], 0, "once more"),
        ([run(0)], [run(1, SLOW), run(2, SLOW)], 1, "got slower; map b dinofast"),
        ([run(0, groups=("else",))], [run(1)], 0, "cannot be compared: they have no group"),
        ([run(0, groups=("else",)), run(0)], [run(1, SLOW), run(2, SLOW)], 1, "got slower; map b dinofast"),
        ([], [run(1)], 0, "nothing to compare with"),
    ],
)
def test_ci_fails_when_two_runs_name_the_same_contender(tmp_path, saved, new, code, said):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "bench", tmp_path / ".ci" / "bench")
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    for number, content in enumerate(saved):
        (results / f"short-{number}.json").write_text(json.dumps(content))
    for name, content in zip(("first", "second"), new, strict=False):
        (tmp_path / f"ready-{name}.json").write_text(json.dumps(content))
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *bench.compare*) PYTHONPATH={ROOT} exec {sys.executable} "$@" ;; esac\n'
        'for last; do :; done; out=${last#--benchmark-json=}; cp "${out%/*}/ready-${out##*/}" "$out"\n'
    )
    python.chmod(0o755)
    command = [str(tmp_path / ".ci" / "bench"), str(tmp_path), str(python)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, said in done.stdout) == (code, True), done.stdout + done.stderr
