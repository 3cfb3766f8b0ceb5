"""README's tables say what the saved runs do."""

import json
from pathlib import Path

import pytest

readme = pytest.importorskip("bench.readme", reason="bench/ is not beside these tests")


def test_tables_are_those_of_the_saved_runs():
    text = readme.README.read_text()
    assert readme.filled(text) == text, "run python -m bench.readme"


def test_a_changed_figure_is_seen(monkeypatch, tmp_path):
    for name in ("demo-2-cores.json", "real-2-cores.json", "cpu-2-cores.json"):
        saved = (readme.RESULTS / name).read_text()
        Path(tmp_path, name).write_text(saved.replace('"auroc": 0.95', '"auroc": 0.85'))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    text = readme.README.read_text()
    assert readme.filled(text) != text


def test_a_table_without_marks_is_an_error():
    text = readme.README.read_text().replace("<!-- demo -->", "")
    with pytest.raises(ValueError, match="marks the table demo 0 times"):
        readme.filled(text)


def test_a_table_without_rows_has_no_head(monkeypatch, tmp_path):
    text = readme.README.read_text()
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    for table in readme.TABLES.values():
        assert list(table()) == []
    emptied = readme.filled(text)
    for name in readme.TABLES:
        assert f"<!-- {name} -->\n<!-- end {name} -->" in emptied
    monkeypatch.undo()
    assert readme.filled(emptied) == readme.filled(text)


def test_memory_is_introduced_where_it_was_measured(monkeypatch, tmp_path):
    facts = {"contender": "dinofast", "peak_extra_bytes": 2**21}
    peer = {"contender": "torch", "peak_extra_bytes": 2**23}
    group = {"group": "upsample_blur image_32_to_448", "stats": {"median": 1}}
    benches = [group | {"extra_info": found} for found in (facts, peer)]
    (tmp_path / "memory-2-cores.json").write_text(json.dumps({"benchmarks": benches}))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    lines = list(readme.memory())
    assert lines[0].startswith("Peak extra memory")
    assert lines[-3:-1] == ["| Work | dinofast | Peers |", "|---|---|---|"]
    assert lines[-1].endswith("| 2.0 MiB | torch 8.0 MiB |")
