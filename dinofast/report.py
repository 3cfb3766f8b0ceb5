"""One self-contained HTML page of anomaly maps, metrics and histograms, from plain arrays.

The page fetches nothing: pictures are embedded PNG files. The same input gives the same bytes.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinofast.figures import (
    THRESHOLD_COLOR,
    TRUTH_COLOR,
    check_arrays,
    color_scale,
    color_stops,
    histogram_png,
    overlay_png,
)
from dinofast.files import replacing

__all__ = ["Histogram", "Panel", "Section", "Table", "overlay_png", "write_report"]


@dataclass(frozen=True)
class Panel:
    """One image with its anomaly map.

    Attributes:
        source: what the page calls it.
        image: (H, W, 3) uint8.
        map: (H, W) real numbers, higher is more abnormal; what is not finite is drawn gray.
        score: image score.
        truth: (H, W) bool, True where abnormal; None where it is not known.
    """

    source: str
    image: NDArray[np.uint8]
    map: NDArray[Any]
    score: float
    truth: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Histogram:
    """Scores of two classes, drawn over each other as shares of their class.

    Attributes:
        title: above the plot.
        scores: any shape, real numbers; what is not finite is left out and counted above the plot.
        labels: same size, bool or 0 and 1, 1 is abnormal; None draws all scores as one class.
        threshold: drawn as a line; None draws none.
    """

    title: str
    scores: NDArray[Any]
    labels: NDArray[Any] | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Table:
    """A table: a caption, the heads of the columns and rows of text or numbers.

    Attributes:
        caption: above the table.
        head: one text a column.
        rows: one value a column in each; floats are shown with four digits.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Section:
    """One data set on the page; every part but the title may be empty.

    Attributes:
        title: heading.
        notes: paragraphs below it.
        tables: metrics, times by stage, peak memory.
        panels: images with maps, all on one color scale.
        threshold: pixel threshold in the units of the maps: a contour, and the middle of the color scale.
        histograms: of pixel scores and image scores.
        citations: sources and licenses of data and weights, at the end.
    """

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    panels: Sequence[Panel] = ()
    threshold: float | None = None
    histograms: Sequence[Histogram] = ()
    citations: Sequence[str] = ()


def write_report(
    path: str | os.PathLike[str],
    sections: Sequence[Section],
    *,
    title: str = "dinofast report",
    max_panels: int = 8,
    max_bytes: int = 5_000_000,
) -> Path:
    """Write the page; nothing is left at `path` unless it is whole.

    Of more than `max_panels` images a section shows those with the highest scores, a quarter of them from
    images without any abnormal pixel where there are such; the page says how many it leaves out.

    Args:
        path: of the HTML file; its folder is made.
        sections: in the order of the page.
        title: of the page.
        max_panels: images a section shows at most.
        max_bytes: when the pictures of all sections fill this, further images are left out.

    Returns:
        The path.

    Raises:
        InputError: a panel's or histogram's arrays cannot be drawn, matplotlib is missing, or the file
            cannot be written.
    """
    budget = max_bytes // max(sum(bool(section.panels) for section in sections), 1)
    body = "\n".join(_section(section, max_panels, budget) for section in sections)
    page = _PAGE.format(title=escape(title), style=_STYLE, body=body)
    with replacing(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "backslashreplace"))
    return Path(path)


def _section(section: Section, max_panels: int, budget: int) -> str:
    parts = [f"<section><h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(note)}</p>" for note in section.notes]
    parts += ['<div class="tables">', *map(_table, section.tables), "</div>"] if section.tables else []
    plots = [_histogram(histogram) for histogram in section.histograms]
    parts += ['<div class="plots">', *plots, "</div>"] if plots else []
    if section.panels:
        parts += _panels(section, max_panels, budget - sum(map(len, plots)))
    parts += ["<h3>Sources and licenses</h3>"] if section.citations else []
    parts += [f'<p class="small">{escape(citation)}</p>' for citation in section.citations]
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.head)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{escape(_text(cell))}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    caption = escape(table.caption)
    return (
        f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"
    )


def _text(cell: object) -> str:
    return f"{cell:.4g}" if isinstance(cell, (float, np.floating)) else str(cell)


def _panels(section: Section, max_panels: int, budget: int) -> list[str]:
    for panel in section.panels:
        check_arrays(panel.source, panel.image, panel.map, panel.truth)
    scale = color_scale([panel.map for panel in section.panels], section.threshold)
    shown: list[str] = []
    for panel in _chosen(section.panels, max_panels):
        figure = _panel(panel, scale, section.threshold)
        budget -= len(figure)
        if budget < 0:
            break
        shown.append(figure)
    total = len(section.panels)
    count = f"All {total}" if len(shown) == total else f"{len(shown)} of {total}, by highest score"
    return [
        f"<h3>Anomaly maps</h3><p>Images: {count}. {_KEY}</p>",
        _color_bar(scale, section.threshold),
        *shown,
    ]


def _chosen(panels: Sequence[Panel], limit: int) -> list[Panel]:
    ranked = sorted(panels, key=lambda panel: -panel.score)
    abnormal = [panel for panel in ranked if panel.truth is not None and panel.truth.any()]
    normal = [panel for panel in ranked if panel.truth is None or not panel.truth.any()]
    n_normal = min(len(normal), max(limit // 4, limit - len(abnormal)))
    return abnormal[: limit - n_normal] + normal[:n_normal]


def _panel(panel: Panel, scale: tuple[float, float], threshold: float | None) -> str:
    colored: dict[str, Any] = {"map": panel.map, "scale": scale}
    outlined: dict[str, Any] = {"truth": panel.truth}
    pictures = {
        "image": overlay_png(panel.image, **outlined),
        "anomaly map": overlay_png(panel.image, **colored),
        "map over image": overlay_png(panel.image, **colored, **outlined, threshold=threshold, opacity=0.4),
    }
    images = "".join(_img(png, f"{panel.source}: {what}") for what, png in pictures.items())
    above = ""
    if threshold is not None:
        above = f" · {np.mean(np.asarray(panel.map) > threshold):.1%} of pixels above the threshold"
    caption = f"<b>{escape(panel.source)}</b> score {panel.score:.4g}{above}"
    return f'<figure><div class="row">{images}</div><figcaption>{caption}</figcaption></figure>'


def _color_bar(scale: tuple[float, float], threshold: float | None) -> str:
    middle = "" if threshold is None else f"threshold {threshold:.4g}"
    ends = f"<span>{scale[0]:.4g}</span><span>{middle}</span><span>{scale[1]:.4g} and more</span>"
    return (
        '<div class="bar" role="img" aria-label="color scale of all maps" '
        f'style="background: linear-gradient(to right, {", ".join(color_stops())})"></div>'
        f'<div class="ends">{ends}</div>'
    )


def _histogram(histogram: Histogram) -> str:
    lost = int(np.count_nonzero(~np.isfinite(histogram.scores)))
    note = f"{lost:,} scores that are not finite are left out" if lost else ""
    png = histogram_png(histogram.scores, histogram.labels, histogram.threshold)
    picture = _img(png, f"{histogram.title}: histogram of scores")
    return f"<figure><figcaption><b>{escape(histogram.title)}</b>{note}</figcaption>{picture}</figure>"


def _img(png: bytes, alt: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'


_KEY = (
    "Left: image; middle: map on the one color scale of this section; right: both. "
    f'<span class="key" style="border-color: {TRUTH_COLOR}"></span>ground truth '
    f'<span class="key" style="border-color: {THRESHOLD_COLOR}"></span>threshold'
)
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f4f5f7; --text: #1c1e21; --soft: #5f6770;
  --line: #dcdfe3; }
@media (prefers-color-scheme: dark) {
  :root { --back: #15171a; --card: #1e2125; --text: #e8eaed; --soft: #9aa2ab; --line: #363b41; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { margin-top: 2rem; border-bottom: 1px solid var(--line); }
p { max-width: 46rem; }
.tables, .plots { display: flex; flex-wrap: wrap; gap: 1rem 2rem; margin-bottom: 1.5rem;
  align-items: flex-start; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; }
th { color: var(--soft); font-weight: 500; }
figure { margin: 0 0 1rem; padding: .75rem; background: var(--card); border-radius: .5rem; }
.plots figure { flex: 1 1 20rem; max-width: 36rem; margin: 0; }
.row { display: grid; grid-template-columns: repeat(3, 1fr); gap: .4rem; }
@media (max-width: 34rem) {
  .row { grid-template-columns: repeat(2, 1fr); } .row img:last-child { grid-column: 1 / -1; }
}
img { display: block; width: 100%; height: auto; border-radius: .25rem; }
figcaption { margin-top: .4rem; } .small, figcaption { color: var(--soft); font-size: .9rem; }
figcaption b { color: var(--text); margin-right: .6rem; }
.bar { height: 1rem; border-radius: .25rem; }
.ends { display: grid; grid-template-columns: 1fr auto 1fr; margin-bottom: 1rem; font-size: .9rem;
  color: var(--soft); } .ends :last-child { text-align: right; }
.key { display: inline-block; width: 1rem; height: .8rem; border: 2px solid; border-radius: .2rem;
  margin: 0 .3rem 0 .8rem; vertical-align: -.1rem; background: #333; }
"""
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""
