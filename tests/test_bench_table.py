"""Published and measured figures side by side, from saved JSON; what is missing stays empty."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="bench/ is not beside the tests")
ABOUT = {"machine": "x86_64", "cpu": "Some CPU", "threads": 2, "torch": "2", "python": "3"}


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import table

    return table


def real(**changes):
    run = {
        "set": "lung-ct",
        "row": "memory_bank",
        "backbone": "efficientnet-lite0",
        "level": "pixel",
        "auroc": 0.9123,
        "aupr": 0.25,
        "peak_bytes": 1_500_000_000,
        "seconds_per_image": {"read": 5.0, "backbone": 0.03, "model": 0.002},
    } | changes
    return {"about": ABOUT, "runs": [run]}


def speed(**changes):
    facts = {"contender": "dinofast", "ratio_to_peers": {"torch": 0.25}, "disturbed": False} | changes
    peer = {"contender": "torch"}
    return {
        "machine_info": {"cpu": {"brand_raw": "Some CPU"}, "threads": 2, "machine": "x86_64"},
        "benchmarks": [
            {"group": "knn a", "stats": {"median": s}, "extra_info": facts_}
            for s, facts_ in ((0.002, facts), (0.008, peer))
        ],
    }


def test_published_rows_name_their_gpu_and_leave_out_what_nobody_reported(table):
    text = table.markdown(table.published_entries(), [])
    rows = {tuple(c.strip() for c in line.split("|")[1:3]): line for line in text.splitlines() if "|" in line}
    dpmm = "| DPMM | published | 96.21 | 43.43 | 39 | 1.6 | NVIDIA A6000 48 GB [DPMM] |"
    assert rows["brain (pixel)", "DPMM"].endswith(dpmm)
    ar = "| published | 98.35 | 72.42 |  |  | GPU not stated [AR] |"
    assert rows["brain (pixel)", "AR, dilated convolutions"].endswith(ar)
    assert "| 20 |  | GPU not stated" in rows["resc (pixel)", "AR, dilated convolutions"]
    assert ("brain (pixel)", "PatchCore WRN50, 10 %") not in rows
    assert "arXiv 2509.19997" in text


def test_measured_rows_name_their_machine_and_leave_reading_out_of_the_time(table):
    [entry] = table.measured_entries("real.json", real())
    assert (entry.auroc, entry.aupr, entry.memory_gb) == pytest.approx((91.23, 25.0, 1.5))
    assert entry.runtime_ms == pytest.approx(32.0)
    assert (entry.model, entry.where) == ("memory_bank", "Some CPU, 2 threads [real.json]")
    assert "| measured | 91.23 | 25.00 | 32 | 1.5 | Some CPU" in table.markdown([entry], [])


def test_random_weights_have_a_time_and_no_quality(table):
    [entry] = table.measured_entries("real.json", real(backbone="random:dinov2-small", row="k-NN script"))
    assert (entry.auroc, entry.aupr, entry.model) == (None, None, None)
    assert "| k-NN script, dinov2-small size | measured |  |  | 32 |" in table.markdown([entry], [])


def test_a_report_of_the_protocol_is_a_measured_row(table):
    report = {
        "protocol": "bmad",
        "set": "resc",
        "model": "MemoryBank(n_neighbors=1)",
        "backbone": "dinov2-small: more words",
        "pixel": {"auroc": 0.9, "aupr": 0.5},
        "seconds": {"backbone": 0.5},
    }
    [entry] = table.measured_entries("resc.json", report)
    assert (entry.set, entry.method) == ("resc", "dinofast MemoryBank, dinov2-small")
    assert (entry.model, entry.runtime_ms, entry.memory_gb) == ("memory_bank", 500.0, None)


def test_speeds_are_told_beside_the_peers_of_the_run(table):
    [row] = table.operator_rows("cpu.json", speed(share_of_ceiling=0.5, peak_extra_bytes=3 << 20))
    cells = "knn a | dinofast | 2 ms | torch 4.0× | 3.0 MiB | 50% | Some CPU, 2 threads [cpu.json]"
    assert row == f"| {cells} |"
    [row] = table.operator_rows("cpu.json", speed(disturbed=True))
    assert "| ~2 ms | torch 4.0× |  |  |" in row


def test_the_command_writes_tables_and_plot_from_the_files_named(table, tmp_path, capsys):
    for name, content in (("real", real()), ("cpu", speed()), ("other", {"sets": []})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = [str(path) for path in sorted(tmp_path.glob("*.json"))]
    out, plot = tmp_path / "t.md", tmp_path / "t.svg"
    table.main([*files, "--out", str(out), "--plot", str(plot)])
    said = capsys.readouterr().out
    assert out.read_text() in said
    assert "without rows for these tables: other.json" in said
    assert "measured" in out.read_text()
    first = plot.read_bytes()
    assert b"<svg" in first
    table.main([*files, "--out", str(out), "--plot", str(plot)])
    assert plot.read_bytes() == first


def test_without_matplotlib_the_tables_are_written_all_the_same(table, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    (tmp_path / "real.json").write_text(json.dumps(real()))
    asked = [str(tmp_path / "real.json"), "--out", str(tmp_path / "t.md"), "--plot", str(tmp_path / "t.svg")]
    table.main(asked)
    assert "dinofast[viz]" in capsys.readouterr().out
    assert (tmp_path / "t.md").exists()
    assert not (tmp_path / "t.svg").exists()


def test_a_torn_file_is_named(table, tmp_path, capsys):
    (tmp_path / "torn.json").write_text("torn{")
    with pytest.raises(SystemExit):
        table.main([str(tmp_path / "torn.json"), "--out", str(tmp_path / "t.md")])
    assert "torn.json is no saved result" in capsys.readouterr().err
