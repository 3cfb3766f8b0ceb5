"""README's tables say what the saved runs do."""

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
