"""Published figures, and differences from them."""

from __future__ import annotations

import pytest

from dinofast import published
from dinofast.scoreboard import Report

# Published figures


def test_published_rows_are_those_of_the_specification() -> None:
    for name, dpmm, dilated, count in (
        ("brain", (96.21, 43.43), (98.35, 72.42), 18),
        ("liver", (95.46, 9.02), (96.39, 5.51), 20),
        ("resc", (90.20, 41.66), (93.09, 42.34), 20),
    ):
        rows = {(row.source.key, row.method): row for row in published.rows(name)}
        assert len(rows) == count
        assert (rows["DPMM", "DPMM"].auroc, rows["DPMM", "DPMM"].aupr) == dpmm
        found = rows["AR", "AR, dilated convolutions"]
        assert (found.auroc, found.aupr) == dilated
        assert all(0 < row.aupr < row.auroc < 100 for row in rows.values())
    assert rows["DPMM", "DPMM"].dice == {0.1: 38.00, 0.05: 43.74, 0.01: 43.49}
    assert rows["AR", "AR, dilated convolutions"].deviation == (0.19, 1.07)
    assert (rows["DPMM", "DPMM"].runtime_ms, rows["DPMM", "DPMM"].memory_gb) == (58, 2.0)
    assert (rows["AR", "AR, dilated convolutions"].runtime_ms, rows["AR+", "UTRAD"].runtime_ms) == (20, 42)
    assert rows["AR+", "UTRAD"].memory_gb is None
    assert published.rows(None) == published.rows("heart") == []


def test_differences_are_measured_minus_published(report: Report) -> None:
    rows = report.published
    assert len(rows) == 18
    assert [row["same_model"] for row in rows] == sorted((row["same_model"] for row in rows), reverse=True)
    assert {row["model"] for row in rows if row["same_model"]} == {"memory_bank"}
    assert {row["method"].split()[0] for row in rows if row["same_model"]} == {"AnomalyDINO,", "AnomalyDINO"}
    assert {row["model"] for row in rows if row["method"].startswith("PatchCore")} == {"patchcore"}
    by_key = {(row["source"]["key"], row["method"]): row for row in rows}
    dpmm, ar = by_key["DPMM", "DPMM"], by_key["AR", "AR, dilated convolutions"]
    assert dpmm["auroc_difference"] == pytest.approx(100 * report.pixel.auroc - 96.21)
    assert dpmm["aupr_difference"] == pytest.approx(100 * report.pixel.aupr - 43.43)
    assert dpmm["dice_difference"][0.01] == pytest.approx(100 * report.dice[2].dice - 45.87)
    assert ar["aupr_difference"] == pytest.approx(100 * report.pixel.average_precision - 72.42)
    assert (dpmm["same_size"], ar["same_size"]) == (True, False)
