"""The demo: the main job on real medical images, from files on disk to a calibrated report."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dinofast import backbone as backbones
from dinofast.backbone import Backbone
from dinofast.calibrate import Threshold
from dinofast.data import Sample
from dinofast.data.demo import NAMES, DemoSet
from dinofast.data.demo import load as load_set
from dinofast.detector import Detector
from dinofast.errors import InputError
from dinofast.evaluate import Evaluation, evaluate
from dinofast.figures import overlay_png, require_matplotlib
from dinofast.files import replacing
from dinofast.report import Histogram, Panel, Section, Table, write_report
from dinofast.types import Prediction

if TYPE_CHECKING:
    from dinofast.progress import Progress

_LOG = logging.getLogger("dinofast.demo")


@dataclass(frozen=True)
class SetResult:
    """What the demo found on one data set.

    Attributes:
        name: "brain" or "lung-ct".
        citation: whom to cite for the data.
        license: of the data.
        evaluation: metrics on the slices with a lesion.
        threshold: pixel threshold from normal slices.
        fit_seconds: seconds per image of the fit, by stage.
        n_fit: normal slices learned.
        map_file: NIfTI with the anomaly maps on the grid of the scan.
        overlays: pictures of the maps, one a slice.
    """

    name: str
    citation: str
    license: str
    evaluation: Evaluation
    threshold: Threshold
    fit_seconds: dict[str, float]
    n_fit: int
    map_file: Path
    overlays: list[Path] = field(repr=False)


@dataclass(frozen=True)
class DemoResult:
    """What the demo did.

    Attributes:
        backbone: one line on which backbone ran and why.
        sets: results in order.
        skipped: data set -> why it did not run.
        peak_memory: bytes, the largest resident memory of the process so far; 0 where it cannot be told.
        report: the HTML page.
    """

    backbone: str
    sets: list[SetResult]
    skipped: dict[str, str]
    peak_memory: int
    report: Path


def run(
    names: Sequence[str] = NAMES,
    output: str | os.PathLike[str] = "demo-output",
    *,
    backbone: Backbone | str = "auto",
    progress: Progress | None = None,
) -> DemoResult:
    """Fit a memory bank on normal slices, calibrate it, score the slices with a lesion, write everything.

    Written are `report.html`, `NAME_map.nii.gz` with the maps on the scan's own grid, and an overlay of each
    scored slice in `NAME/`.

    Args:
        names: which of "brain" (embedded) and "lung-ct" (about 70 MB, fetched once). When several are asked
            for, those that cannot be fetched are skipped and the rest runs.
        output: folder, made if needed.
        backbone: a backbone, or what `dinofast.backbone.load` takes.
        progress: called as progress(stage, done, total).

    Returns:
        The results.

    Raises:
        InputError: an unknown name, none of the sets is to be had, matplotlib is missing, or the folder
            cannot be written.
    """
    names = list(dict.fromkeys(names))
    if unknown := sorted(set(names) - set(NAMES)):
        raise InputError(f"unknown demo set {', '.join(unknown)}; one of {', '.join(NAMES)}")
    require_matplotlib()
    folder = Path(output)
    with replacing(folder / "report.html") as temporary:  # a folder that cannot be written stops the run here
        temporary.write_text("<p>The demo is running, or was stopped.</p>\n")
    skipped: dict[str, str] = {}
    ready = [found for name in names if (found := _opened(name, len(names) == 1, skipped, progress))]
    if not ready:
        raise InputError("no demo set can run: " + "; ".join(skipped.values()))
    network = backbone if isinstance(backbone, Backbone) else backbones.load(backbone)
    results, sections = [], []
    for demo_set in ready:
        result, section = _run_set(demo_set, network, folder, progress)
        results.append(result)
        sections.append(section)
    peak = _peak_memory()
    noted = [
        replace(s, notes=[*s.notes, f"Peak memory of the process: {peak / 2**20:.0f} MiB."]) for s in sections
    ]
    page = write_report(folder / "report.html", noted, title="dinofast demo: real scans, real lesions")
    return DemoResult(network.describe(), results, skipped, peak, page)


def _run_set(
    demo_set: DemoSet, network: Backbone, folder: Path, progress: Progress | None
) -> tuple[SetResult, Section]:
    name = demo_set.name
    told = None if progress is None else lambda stage, done, total: progress(f"{name}: {stage}", done, total)
    detector = Detector(network, "memory_bank").fit(demo_set.fit, progress=told)
    fit_seconds = detector.seconds
    if demo_set.calibrate:
        threshold = detector.calibrate(demo_set.calibrate, progress=told)
    else:
        threshold = detector.calibrate(demo_set.fit, cross_fit=6, progress=told)
    scale = (0.0, 2 * threshold.value)
    panels: list[Panel] = []
    kept: list[tuple[int, Any, Any, Any]] = []  # slice, map, truth, pixels that count
    overlays: list[Path] = []

    def keep(sample: Sample, prediction: Prediction) -> None:
        assert sample.volume is not None
        map, image, truth = prediction.map.numpy(), sample.load(), sample.mask()
        title = f"{name}, slice {sample.volume.index}"
        panels.append(Panel(title, image, map, prediction.score, truth))
        inside = demo_set.region(sample)
        kept.append((sample.volume.index, map, truth, np.ones(map.shape, bool) if inside is None else inside))
        picture = overlay_png(
            image,
            map,
            scale=scale,
            opacity=0.4,
            truth=truth,
            threshold=threshold.value,
            width=512,
            name=title,
        )
        overlays.append(folder / name / f"slice-{sample.volume.index:03d}.png")
        with replacing(overlays[-1]) as temporary:
            temporary.write_bytes(picture)

    found = evaluate(detector, demo_set.test, region=demo_set.region, on_prediction=keep, progress=told)
    map_file = folder / f"{name}_map.nii.gz"
    demo_set.volume.write([map for _, map, _, _ in kept], map_file, [index for index, *_ in kept])
    result = SetResult(
        name,
        demo_set.citation,
        demo_set.license,
        found,
        threshold,
        fit_seconds,
        len(demo_set.fit),
        map_file,
        overlays,
    )
    histogram = Histogram(
        "Pixel scores",
        np.concatenate([map[inside] for _, map, _, inside in kept]),
        np.concatenate([truth[inside] for _, _, truth, inside in kept]),
        threshold.value,
    )
    return result, Section(
        title=f"{name} ({len(demo_set.fit)} normal slices learned, {found.n_images} scored)",
        notes=[demo_set.note, f"Backbone: {network.describe()}.", str(threshold).capitalize() + "."],
        tables=tables(result),
        panels=panels,
        threshold=threshold.value,
        histograms=[histogram],
        citations=[f"Data: {demo_set.citation} License: {demo_set.license}."],
    )


def tables(result: SetResult) -> list[Table]:
    """Give a result's figures as two tables: separation and cost."""
    pixel = result.evaluation.pixel
    assert pixel is not None
    share = pixel.n_anomalous / (pixel.n_normal + pixel.n_anomalous)
    quality = [
        ("pixel AUROC", f"{pixel.auroc:.3f}"),
        ("pixel AUPR (trapezoidal)", f"{pixel.aupr:.3f}"),
        ("pixel average precision", f"{pixel.average_precision:.3f}"),
        ("AUPR of chance", f"{share:.3f}"),
        ("pixel threshold at 5 % false alarms", f"{result.threshold.value:.4f}"),
    ]
    seconds = {**result.evaluation.seconds, "total": sum(result.evaluation.seconds.values())}
    times = [(stage, f"{1e3 * spent:.1f} ms") for stage, spent in seconds.items()]
    return [
        Table("How well it separates", ("figure", "value"), quality),
        Table("Time per image", ("stage", "value"), times),
    ]


def _opened(name: str, alone: bool, skipped: dict[str, str], progress: Progress | None) -> DemoSet | None:
    try:
        return load_set(name, _fetching(name, progress))
    except InputError as error:
        if alone:
            raise
        skipped[name] = str(error)
        _LOG.warning("%s is skipped: %s", name, error)
        return None


def _fetching(name: str, progress: Progress | None) -> Any:
    if progress is None:
        return None
    return lambda done, total: progress(f"{name}: fetch, MB", done // 10**6, total // 10**6)


def _peak_memory() -> int:
    """Give the largest resident memory of this process; Linux counts it in KiB, macOS in bytes."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
