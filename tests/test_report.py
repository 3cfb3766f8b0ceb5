from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dinofast.errors import InputError
from dinofast.figures import color_scale, histogram_png
from dinofast.report import Histogram, Panel, Section, Table, overlay_png, write_report

GRAY = np.full((40, 60, 3), 90, dtype=np.uint8)


def panel(source="a.png", score=0.5, lesion=True, level=0.2, size=(40, 60)):
    values = np.full(size, level, dtype=np.float32)
    truth = np.zeros(size, dtype=bool)
    if lesion:
        truth[10:20, 10:20] = True
        values[truth] = 0.8
    return Panel(source, np.full((*size, 3), 90, dtype=np.uint8), values, score, truth)


def section(**changes):
    scores, labels = np.linspace(0, 1, 50), np.arange(50) > 30
    return Section(
        **{
            "title": "Brain",
            "notes": ["slices are neighbors"],
            "panels": [panel()],
            "threshold": 0.4,
            "tables": [Table("Metrics", ["metric", "value"], [["pixel AUROC", 0.91234567], ["images", 12]])],
            "histograms": [Histogram("Pixel scores", scores, labels, 0.4)],
            "citations": ["CC BY 4.0"],
            **changes,
        }
    )


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def written(tmp_path, *sections, **options):
    text = write_report(tmp_path / "out" / "report.html", sections, **options).read_text(encoding="utf-8")
    return Page(text), text


def pixels(png):
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG"
    return np.asarray(picture.convert("RGB")).astype(int)


def like(picture, color):
    return (np.abs(picture - color).sum(axis=2) < 60).sum()


def test_page_is_whole_and_self_contained(tmp_path):
    page, text = written(tmp_path, section(), section(title="Lung", panels=[]), title="dinofast demo")
    shown = " ".join(page.text)
    for expected in (
        "dinofast demo",
        "Brain",
        "Lung",
        "slices are neighbors",
        "pixel AUROC",
        "0.9123",
        "12",
        "threshold 0.4",
        "0.8 and more",
        "CC BY 4.0",
        "score 0.5",
        "4.2% of pixels above",
    ):
        assert expected in shown, expected
    assert not re.search(r"https?:|src=\"(?!data:image/png;base64,)|<script|<link|@import|url\(", text)
    assert len(page.named("img")) == 3 + 2
    assert page.named("meta")[1]["name"] == "viewport"
    for attributes in page.named("img"):
        assert attributes["alt"]
        pixels(base64.b64decode(attributes["src"].partition(",")[2]))


def test_same_input_same_bytes(tmp_path):
    assert written(tmp_path / "a", section())[1] == written(tmp_path / "b", section())[1]


def test_text_is_escaped(tmp_path):
    evil = '<script>alert("1")</script>&'
    page, text = written(
        tmp_path,
        section(
            title=evil,
            notes=[evil],
            citations=[evil],
            panels=[panel(source=evil)],
            tables=[Table(evil, [evil], [[evil]])],
            histograms=[Histogram(evil, np.arange(3.0))],
        ),
        title=evil,
    )
    assert "<script" not in text
    assert not page.named("script")
    assert page.named("img")[-1]["alt"] == f"{evil}: map over image"


def test_undecodable_file_names_are_written(tmp_path):
    assert "\\udcff" in written(tmp_path, section(panels=[panel(source="a\udcff.png")]))[1]


def test_one_scale_for_all_images_of_a_section():
    bright, dark = np.full((4, 4), 0.9), np.full((4, 4), 0.1)
    assert color_scale([bright, dark], None) == (0, 0.9)
    assert color_scale([bright, dark], 0.3) == (0, 0.6)
    assert color_scale([bright, -dark], 0.3) == (-0.1, pytest.approx(0.7))
    assert color_scale([np.zeros((4, 4))], 0.0) == (0, 1)
    assert color_scale([np.full((4, 4), np.nan), np.array([[np.inf, 0.5]])], None) == (0, 0.5)
    assert color_scale([], None) == (0, 1)


def test_equal_values_have_equal_colors_in_different_images(tmp_path):
    page, _ = written(
        tmp_path, section(panels=[panel("a", lesion=True), panel("b", lesion=False)], threshold=0.5)
    )
    maps = [tag for tag in page.named("img") if tag["alt"].endswith("anomaly map")]
    corners = [pixels(base64.b64decode(tag["src"].partition(",")[2]))[-5, -5] for tag in maps]
    np.testing.assert_array_equal(corners[0], corners[1])


def test_most_telling_images_are_shown(tmp_path):
    panels = [panel(f"lesion{i}", 0.5 + i / 100) for i in range(9)] + [
        panel(f"good{i}", 0.3 + i / 100, lesion=False) for i in range(9)
    ]
    page, _ = written(tmp_path, section(panels=panels), max_panels=4)
    shown = [tag["alt"].split(":")[0] for tag in page.named("img") if tag["alt"].endswith("anomaly map")]
    assert shown == ["lesion8", "lesion7", "lesion6", "good8"]
    assert "4 of 18, by highest score" in " ".join(page.text)
    page, _ = written(tmp_path, section(panels=panels[:1] + panels[9:]), max_panels=4)
    shown = [tag["alt"].split(":")[0] for tag in page.named("img") if tag["alt"].endswith("anomaly map")]
    assert shown == ["lesion0", "good8", "good7", "good6"]


def test_page_stays_below_its_budget(tmp_path):
    rng = np.random.default_rng(0)
    noise = [
        Panel(f"noise{i}", rng.integers(0, 256, (200, 300, 3), np.uint8), rng.random((200, 300)), 1.0)
        for i in range(6)
    ]
    page, text = written(tmp_path, section(panels=noise), section(panels=noise), max_bytes=1_500_000)
    assert len(text) < 1_500_000 + 10_000
    assert 0 < len(page.named("img")) < 2 * (1 + 18)
    assert " of 6, by highest score" in " ".join(page.text)


def test_empty_page_and_section(tmp_path):
    page, _ = written(tmp_path, Section("Only a title"))
    assert not page.named("img")
    assert "Only a title" in page.text
    written(tmp_path)


def test_outlines_are_drawn():
    one = panel()
    green, cyan = (124, 252, 0), (0, 229, 255)
    both = pixels(overlay_png(one.image, one.map, truth=one.truth, threshold=0.4, opacity=0.3))
    assert both.shape == (213, 320, 3)
    plain = pixels(overlay_png(one.image))
    assert like(both, green) + like(both, cyan) > 50
    assert like(plain, green) + like(plain, cyan) == 0
    assert like(pixels(overlay_png(one.image, truth=one.truth)), green) > 50
    assert like(pixels(overlay_png(one.image, one.map, threshold=0.4)), cyan) > 50
    np.testing.assert_array_equal(plain, 90)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.2, 5.0])
def test_no_contour_where_the_map_never_crosses(threshold):
    flat = panel(lesion=False)
    drawn = overlay_png(flat.image, flat.map, truth=flat.truth, threshold=threshold)
    assert drawn == overlay_png(flat.image, flat.map)
    assert overlay_png(GRAY, truth=np.ones((40, 60), dtype=bool)) == overlay_png(GRAY)


def test_missing_values_are_gray():
    values = np.zeros((40, 60))
    values[:20], values[20:30] = np.nan, np.inf
    picture = pixels(overlay_png(GRAY, values, threshold=0.5))
    np.testing.assert_array_equal(picture[10, 10], (134, 142, 150))
    np.testing.assert_array_equal(picture[110, 10], (134, 142, 150))
    assert picture[200, 10].sum() < 20
    overlay_png(GRAY, np.full((40, 60), np.nan), threshold=0.5)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (7, 7), (2000, 20), (20, 2000)])
def test_any_shape_of_image(size):
    image, values = np.zeros((*size, 3), np.uint8), np.zeros(size)
    values[0, 0] = 1
    picture = pixels(overlay_png(image, values, truth=values > 0, threshold=0.5))
    assert picture.shape[1] == 320
    assert 16 <= picture.shape[0] <= 480


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": GRAY.astype(float)}, r"a\.png: image is float64 of shape \(40, 60, 3\)"),
        ({"image": GRAY[..., 0]}, "give uint8"),
        ({"map": np.zeros((60, 40))}, r"map has shape \(60, 40\), its image \(40, 60\)"),
        ({"truth": np.zeros((1, 1), dtype=bool)}, "truth has shape"),
        ({"truth": np.zeros((40, 60))}, "truth is float64; give bool"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, change, message):
    fields = {"source": "a.png", "image": GRAY, "map": np.zeros((40, 60)), "score": 1.0, **change}
    with pytest.raises(InputError, match=message):
        written(tmp_path, section(panels=[Panel(**fields)]))
    assert not (tmp_path / "out").exists()


def test_histograms(tmp_path):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=200)
    two, one = histogram_png(scores, scores > 1, 0.3), histogram_png(scores)
    assert two != one
    assert two == histogram_png(scores, scores > 1, 0.3)
    histogram_png(np.full(5, 0.25), np.zeros(5), 0.25)
    with pytest.raises(InputError, match="200 scores and 3 labels"):
        histogram_png(scores, np.zeros(3))
    with pytest.raises(InputError, match="none of 2 scores is finite"):
        histogram_png(np.array([np.nan, np.inf]))
    scores[:3] = np.nan
    page, _ = written(tmp_path, section(histograms=[Histogram("Image scores", scores)]))
    assert "3 scores that are not finite are left out" in page.text


def test_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'dinofast\[viz\]'"):
        written(tmp_path, section())


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"report\.html: cannot be written"):
        write_report(tmp_path / "file" / "report.html", [section()])


def test_drawing_leaves_no_global_figures():
    code = (
        "import sys, numpy as np\nfrom dinofast.report import overlay_png\n"
        "overlay_png(np.zeros((9, 9, 3), np.uint8))\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
