from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import requests
from PIL import Image
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score

from dinofast import backbone as backbones
from dinofast import cli, demo
from dinofast.backbone import Backbone
from dinofast.data import fetch, rider
from dinofast.data.demo import ASSETS, brain, load
from dinofast.errors import InputError

LAST = r"pixel AUROC (\d\.\d\d) · AUPR (\d\.\d\d) · report (.+)"


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["dinofast", "demo", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code


@pytest.fixture
def quick(lite0: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the demo at 96 pixels, where a test is not about its figures."""
    monkeypatch.setattr(backbones, "load", lambda *_, **__: lite0)


class Page(HTMLParser):
    """What a page fetches, its text and its pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text: list[str] = []
        self.pictures = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action"):
                self.pictures += tag == "img"
                if not (value or "").startswith("data:"):
                    self.fetched.append(f"{tag} {name}={value}")
        if tag in ("script", "link", "iframe", "object"):
            self.fetched.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_brain_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo-output"
    run(monkeypatch, "--data", "brain", "--output", out, "--backbone", "efficientnet-lite0")
    said = capsys.readouterr()
    last = re.fullmatch(LAST, said.out.splitlines()[-1])
    assert last is not None, said.out
    assert Path(last[3]) == out / "report.html"
    assert "Traceback" not in said.err
    assert said.err.count("brain: calibrate: 36 to do") == 1

    label, image = (nibabel.load(ASSETS / f"brain1_{what}.nii.gz") for what in ("label", "image"))
    maps = nibabel.load(out / "brain_map.nii.gz")
    assert maps.shape == image.shape
    np.testing.assert_array_equal(maps.affine, image.affine)
    truth, scores = label.get_fdata() != 0, maps.get_fdata(dtype=np.float32)
    lesion = truth.any(axis=(0, 1))
    assert (scores[..., lesion] != 0).all(axis=(0, 1)).all()
    assert not scores[..., ~lesion].any()
    truth, scores = truth[..., lesion].ravel(), scores[..., lesion].ravel()
    auroc = roc_auc_score(truth, scores)
    precision, recall, _ = precision_recall_curve(truth, scores)
    assert auroc >= 0.80
    assert last[1] == f"{auroc:.2f}"
    assert last[2] == f"{auc(recall, precision):.2f}"
    assert re.search(rf"│ pixel AUROC +│ {auroc:.3f} ", said.out)
    assert re.search(rf"│ AUPR of chance +│ {truth.mean():.3f} ", said.out)
    for stage in ("read", "preprocess", "backbone", "model", "total"):
        assert re.search(rf"│ {stage} +│ \d+\.\d ms", said.out), stage
    assert re.search(r"peak memory \d{3,5} MiB", said.out)
    assert "backbone: efficientnet-lite0: " in said.out
    assert "BSD-3-Clause" in said.out

    page = Page((out / "report.html").read_text(encoding="utf-8"))
    text = " ".join(page.text)
    assert page.fetched == []
    assert page.pictures == 1 + 3 * 7
    assert "neighbors in one volume of one patient" in text
    assert "5 % false alarms" in text
    assert f"{auroc:.3f}" in text
    assert "Peak memory of the process" in text
    assert "Harvard Medical School" in text
    overlays = sorted(path.name for path in (out / "brain").iterdir())
    assert overlays == [f"slice-{i:03d}.png" for i in range(11, 18)]
    for name in overlays:
        Image.open(out / "brain" / name).load()


def test_the_result_is_json(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--data", "brain", "--data", "brain", "--output", tmp_path, "--json")
    said = capsys.readouterr()
    found = json.loads(said.out)
    (brain_set,) = found["sets"]
    assert said.err == ""
    assert found["report"] == str(tmp_path / "report.html")
    assert found["peak_memory"] > 2**26
    assert found["skipped"] == {}
    assert (brain_set["name"], brain_set["n_fit"]) == ("brain", 18)
    assert brain_set["threshold"]["method"] == "cross-fit 6"
    assert brain_set["threshold"]["realized_rate"] <= 0.05
    assert 0 < brain_set["evaluation"]["pixel"]["auroc"] < 1
    assert len(brain_set["overlays"]) == 7
    assert set(brain_set["fit_seconds"]) == {"read", "preprocess", "backbone", "model"}


def test_without_network_the_embedded_set_runs(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise requests.ConnectionError("unreachable")

    monkeypatch.setattr(requests.Session, "request", offline)
    monkeypatch.setenv("DINOFAST_CACHE", str(tmp_path / "cache"))
    run(monkeypatch, "--output", tmp_path / "out")
    said = capsys.readouterr()
    assert re.search(
        r"^lung-ct was skipped: .*the package index cannot be reached \(ConnectionError\)", said.out, re.M
    )
    assert re.fullmatch(LAST, said.out.splitlines()[-1])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "brain",
        "brain_map.nii.gz",
        "report.html",
    ]
    with pytest.raises(InputError, match=r"cannot be reached.*check the network"):
        demo.run(["lung-ct"], tmp_path / "out")


def test_the_second_set_is_reported_too(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stand the brain, with a region and slices to calibrate on, in for the set that takes a network."""
    import dataclasses

    def other(name: str, progress: Any = None) -> Any:
        if progress is not None:
            progress(10**6, 2 * 10**6)
        if name == "brain":
            return brain()
        found = brain()
        inside = ASSETS / "brain1_image.nii.gz"  # voxels other than 0
        return dataclasses.replace(
            found,
            name=name,
            fit=found.fit[::2],
            calibrate=found.fit[1::2],
            region_path=inside,
            license="CC BY 4.0",
        )

    monkeypatch.setattr(demo, "load_set", other)
    run(monkeypatch, "--output", tmp_path)
    said = capsys.readouterr()
    assert "lung-ct: fetch, MB: 2 to do" in said.err
    assert "lung-ct: calibrate: 9 of 9 in" in said.err
    assert "License: CC BY 4.0." in said.out
    first = re.search(r"│ pixel AUROC +│ (\d\.\d)", said.out)
    last = re.fullmatch(LAST, said.out.splitlines()[-1])
    assert first is not None
    assert last is not None
    maps = nibabel.load(tmp_path / "lung-ct_map.nii.gz").get_fdata(dtype=np.float32)
    label, image = (nibabel.load(ASSETS / f"brain1_{w}.nii.gz").get_fdata() for w in ("label", "image"))
    counts = (label != 0).any(axis=(0, 1)) & (image != 0)
    wanted = roc_auc_score(label[counts] != 0, maps[counts])
    shown = re.findall(r"│ pixel AUROC +│ (\d\.\d{3}) ", said.out)
    assert shown[1] == f"{wanted:.3f}"
    assert len(shown) == 2
    assert (tmp_path / "lung-ct" / "slice-011.png").is_file()


def test_a_demo_that_cannot_write_stops_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "load", lambda *_: pytest.fail("work was begun"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file/report\.html: cannot be written"):
        demo.run(["brain"], tmp_path / "file")
    with pytest.raises(InputError, match="unknown demo set liver, nose; one of brain, lung-ct"):
        demo.run(["nose", "brain", "liver"], tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_without_matplotlib_the_demo_stops_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "load", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"drawing needs matplotlib: pip install 'dinofast\[viz\]'"):
        demo.run(["brain"], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.network
@pytest.mark.slow
def test_the_lung_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--data", "lung-ct", "--output", tmp_path, "--backbone", "efficientnet-lite0")
    said = capsys.readouterr()
    last = re.fullmatch(LAST, said.out.splitlines()[-1])
    assert last is not None
    folder = rider.prepared()
    assert folder.is_relative_to(fetch.cache())
    truth, body = (nibabel.load(folder / f"{name}.nii.gz").get_fdata() != 0 for name in ("tumor", "body"))
    maps = nibabel.load(tmp_path / "lung-ct_map.nii.gz")
    np.testing.assert_array_equal(maps.affine, nibabel.load(folder / "image.nii.gz").affine)
    counts = truth.any(axis=(0, 1)) & body
    auroc = roc_auc_score(truth[counts], maps.get_fdata(dtype=np.float32)[counts])
    assert auroc >= 0.90
    assert last[1] == f"{auroc:.2f}"
    assert "CC BY 4.0" in said.out
    assert "doi:10.7937" in said.out
    assert Page((tmp_path / "report.html").read_text(encoding="utf-8")).fetched == []
    assert load("lung-ct").citation in said.out
