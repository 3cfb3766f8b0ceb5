"""Pictures as PNG bytes: maps over images and score histograms; the only importer of matplotlib.

Nothing global is touched: figures are objects that vanish after use. The same input gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinofast.errors import InputError

MAP_COLORS, THRESHOLD_COLOR, TRUTH_COLOR = "inferno", "#00e5ff", "#7cfc00"
_GRAY, _NORMAL, _ANOMALOUS = "#868e96", "#4c9be8", "#f2663b"
_DPI = 100


def overlay_png(
    image: NDArray[np.uint8],
    map: NDArray[Any] | None = None,
    *,
    scale: tuple[float, float] = (0.0, 1.0),
    opacity: float = 1.0,
    truth: NDArray[np.bool_] | None = None,
    threshold: float | None = None,
    width: int = 320,
    name: str = "overlay",
) -> bytes:
    """Draw an image, its map in color over it, and outlines over both.

    Args:
        image: (H, W, 3) uint8.
        map: (H, W) real numbers; what is not finite is drawn gray; None draws the image alone.
        scale: numbers (low, high) at the ends of the color scale.
        opacity: of the map, in [0, 1].
        truth: (H, W) bool, outlined in green.
        threshold: where the map crosses it, a cyan contour is drawn; None draws none.
        width: of the picture in pixels; its height follows the image, at most one and a half times that.
        name: what an error calls the image.

    Returns:
        A PNG file.

    Raises:
        InputError: the arrays do not fit together, or matplotlib is missing.
    """
    check_arrays(name, image, map, truth)
    height = min(max(round(width * image.shape[0] / image.shape[1]), 16), width * 3 // 2)
    figure = require_matplotlib().figure.Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(image, aspect="auto")
    if map is not None:
        colors = require_matplotlib().colormaps[MAP_COLORS].with_extremes(bad=_GRAY)
        values = np.ma.masked_invalid(map)
        axes.imshow(values, cmap=colors, vmin=scale[0], vmax=scale[1], alpha=opacity, aspect="auto")
        if threshold is not None:
            _contour(axes, values, threshold, THRESHOLD_COLOR)
    if truth is not None:
        _contour(axes, truth.astype(np.float64), 0.5, TRUTH_COLOR)
    return _png(figure, transparent=False)


def histogram_png(
    scores: NDArray[Any], labels: NDArray[Any] | None = None, threshold: float | None = None
) -> bytes:
    """Draw the scores of two classes over each other, each as shares of its class, on no background.

    Args:
        scores: any shape, real numbers; what is not finite is left out.
        labels: same size, bool or 0 and 1, 1 is abnormal; None draws all scores as one class.
        threshold: drawn as a line; None draws none.

    Returns:
        A PNG file, 750 pixels wide.

    Raises:
        InputError: no score is finite, sizes differ, or matplotlib is missing.
    """
    scores = np.asarray(scores).reshape(-1)
    finite = np.isfinite(scores)
    if not finite.any():
        raise InputError(f"none of {scores.size} scores is finite; a histogram needs at least one")
    kinds = [("all", _NORMAL, scores[finite])]
    if labels is not None:
        positive = np.asarray(labels).reshape(-1).astype(np.bool_)
        if positive.size != scores.size:
            raise InputError(f"{scores.size} scores and {positive.size} labels; give one label a score")
        kinds = [
            ("normal", _NORMAL, scores[finite & ~positive]),
            ("anomalous", _ANOMALOUS, scores[finite & positive]),
        ]
    span = [scores[finite].min(), scores[finite].max(), *([] if threshold is None else [threshold])]
    bins = min(80, 10 + round(scores.size**0.5))
    edges = np.histogram_bin_edges(np.array(span, dtype=np.float64), bins=bins)
    figure = require_matplotlib().figure.Figure(
        figsize=(5.2, 2.7), dpi=144, layout="constrained", facecolor="none"
    )
    axes = figure.add_subplot(facecolor="none")
    for name, color, chosen in kinds:
        if chosen.size:
            share = np.histogram(chosen, edges)[0] / chosen.size
            axes.stairs(share, edges, fill=True, color=color, alpha=0.55, label=f"{name} ({chosen.size:,})")
            axes.stairs(share, edges, color=color, linewidth=1.2)
    if threshold is not None:
        axes.axvline(threshold, color=_GRAY, linestyle="--", label=f"threshold {threshold:.4g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("score", color=_GRAY)
    axes.set_ylabel("share of its class", color=_GRAY)
    axes.tick_params(colors=_GRAY)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GRAY)
    axes.legend(frameon=False, labelcolor=_GRAY, fontsize="small")
    return _png(figure, transparent=True)


def color_scale(maps: Sequence[NDArray[Any]], threshold: float | None) -> tuple[float, float]:
    """Choose one color scale for many maps.

    From 0, or the lowest value where that is negative, to twice as far as the threshold, which so lies in the
    middle; without a threshold, to the highest value.

    Args:
        maps: each (H, W); what is not finite does not count.
        threshold: in the units of the maps, or None.

    Returns:
        Numbers (low, high), low < high.

    >>> color_scale([np.array([[0.1, 0.9]])], threshold=0.25)
    (0.0, 0.5)
    """
    finite = [values[np.isfinite(values)] for values in map(np.asarray, maps)]
    low = min([0.0, *(float(values.min()) for values in finite if values.size)])
    high = max([low, *(float(values.max()) for values in finite if values.size)])
    if threshold is not None and threshold > low:
        high = 2 * threshold - low
    return (low, high) if high > low else (low, low + 1)


def color_stops(n: int = 17) -> list[str]:
    """Give n evenly spaced colors of the map scale as "#rrggbb", low to high."""
    scale = require_matplotlib().colormaps[MAP_COLORS]
    colors = np.rint(255 * scale(np.linspace(0, 1, n))[:, :3]).astype(int)
    return ["#{:02x}{:02x}{:02x}".format(*color) for color in colors.tolist()]


def check_arrays(
    name: str, image: NDArray[Any], map: NDArray[Any] | None, truth: NDArray[Any] | None
) -> None:
    """Refuse what `overlay_png` cannot draw.

    Raises:
        InputError: the image is not uint8 (H, W, 3), or the map or the bool truth is not (H, W).
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InputError(f"{name}: image is {image.dtype} of shape {image.shape}; give uint8 (H, W, 3)")
    for what, array in (("map", map), ("truth", truth)):
        if array is not None and array.shape != image.shape[:2]:
            raise InputError(
                f"{name}: {what} has shape {array.shape}, its image {image.shape[:2]}; resize one of them"
            )
    if truth is not None and truth.dtype != np.bool_:
        raise InputError(f"{name}: truth is {truth.dtype}; give bool, for instance mask > 0")


def _contour(axes: Any, values: Any, level: float, color: str) -> None:
    if min(values.shape) < 2 or not values.min() < level <= values.max():
        return
    axes.contour(values, levels=[level], colors="black", linewidths=2.6, alpha=0.6)
    axes.contour(values, levels=[level], colors=color, linewidths=1.3)


def _png(figure: Any, transparent: bool) -> bytes:
    canvas = require_matplotlib().backends.backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    buffer = io.BytesIO()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba()))
    picture.convert("RGBA" if transparent else "RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def require_matplotlib() -> Any:
    """Give the package that draws.

    Raises:
        InputError: it is not installed.
    """
    try:
        import matplotlib
        import matplotlib.backends.backend_agg
        import matplotlib.figure
    except ImportError as error:
        raise InputError("drawing needs matplotlib: pip install 'dinofast[viz]'") from error
    return matplotlib
