"""What a protocol run found: as JSON, as tables, and in the paired test against another saved run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dinofast.calibrate import Threshold
from dinofast.errors import InputError
from dinofast.evaluate import Ranking
from dinofast.files import replacing
from dinofast.metrics import Bounded, PairedTest, paired_permutation
from dinofast.report import Table

_SETTINGS = ("mask_rule", "map_size")


@dataclass(frozen=True)
class DiceAt:
    """Dice where a share `fpr` of normal validation scores would be called anomalous.

    Attributes:
        fpr: the share asked for.
        threshold: with the share that came out, on valid.
        dice: of all test pixels pooled, in [0, 1].
        test_fpr: share of normal test pixels above the threshold.
    """

    fpr: float
    threshold: Threshold
    dice: float
    test_fpr: float


@dataclass(frozen=True)
class ImageRow:
    """One test image.

    Attributes:
        source: its path relative to the set.
        label: 0 normal, 1 anomalous.
        score: image score.
        auroc: of its pixels; None unless its mask marks some of them and not all.
        aupr: likewise.
    """

    source: str
    label: int
    score: float
    auroc: float | None
    aupr: float | None


@dataclass(frozen=True)
class Report:
    """What `dinofast.protocol.run` found; figures are shares of 1 but for `published`, which is percent.

    Attributes:
        set: "brain", "liver", "resc" or None.
        root: the folder.
        backbone: in one line.
        model: as it prints.
        model_bytes: size of what it learned.
        n_train: images learned.
        counts: "split/class" -> images.
        settings: mask rule, labels, size of maps, what the thresholds are quantiles of.
        notes: what a reader should know of the data: counts that differ, overlap, masks that surprise.
        overlap: see `dinofast.data.bmad.overlap`.
        pixel: ranking of all test pixels; its `error` bounds what binning can have cost.
        pro: per-region overlap up to a false-positive rate of 0.3; None when not asked for.
        dice: at each rate.
        image: ranking of image scores; None when there is one label only.
        image_wise: mean AUROC and AUPR of single images, over those that have both kinds of pixels.
        published: see `dinofast.published.compared`.
        seconds: seconds per test image by stage.
        fit_seconds: those of the fit, its validation too, per train image; empty where it came fitted.
        images: one row a test image, in order.
    """

    set: str | None
    root: str
    backbone: str
    model: str
    model_bytes: int
    n_train: int
    counts: dict[str, int]
    settings: dict[str, str]
    notes: list[str]
    overlap: dict[str, list[tuple[str, str]]]
    pixel: Ranking
    pro: Bounded | None
    dice: list[DiceAt]
    image: Ranking | None
    image_wise: dict[str, float] | None
    published: list[dict[str, Any]] = field(repr=False)
    seconds: dict[str, float]
    fit_seconds: dict[str, float]
    images: list[ImageRow] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Give everything as JSON types."""
        pro = None if self.pro is None else self.pro._asdict()
        return {"protocol": "bmad", **asdict(replace(self, pro=None)), "pro": pro}


def write(
    path: str | os.PathLike[str], report: Report, tests: Mapping[str, PairedTest] | None = None
) -> None:
    """Write a report as JSON, whole or not at all.

    Args:
        path: the file.
        report: what the protocol found.
        tests: see `against`.

    Raises:
        InputError: the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(to_dict(report, tests), indent=1) + "\n", encoding="utf-8")


def to_dict(report: Report, tests: Mapping[str, PairedTest] | None = None) -> dict[str, Any]:
    """Give a report with its paired tests as JSON types."""
    return {**report.to_dict(), "against": {name: asdict(test) for name, test in (tests or {}).items()}}


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `write` wrote.

    Raises:
        InputError: no such file, or not a report.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give the JSON of another run"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); give the JSON of another run") from error
    if (
        not isinstance(found, dict)
        or found.get("protocol") != "bmad"
        or not {"images", "set", "settings"} <= set(found)
        or not isinstance(found["settings"], dict)
        or not set(_SETTINGS) <= set(found["settings"])
    ):
        raise InputError(f"{path}: is not a report of this protocol; give the JSON of another run")
    return found


def check_comparable(name: str | None, settings: Mapping[str, str], other: Mapping[str, Any]) -> None:
    """Raise InputError unless another run was made on this set with these masks and this size of maps."""
    for what, one, two in [
        ("set", name, other["set"]),
        *((key, settings[key], other["settings"][key]) for key in _SETTINGS),
    ]:
        if one != two:
            raise InputError(f"the runs differ in {what}, {one!r} and {two!r}; compare runs of one protocol")


def against(
    report: Mapping[str, Any],
    other: Mapping[str, Any],
    *,
    n_permutations: int = 10_000,
    alternative: str = "two-sided",
    seed: int = 0,
) -> dict[str, PairedTest]:
    """Test image-wise AUROC and AUPR of two runs on the same images against each other.

    Images whose mask marks nothing have neither figure and take no part; the publication does not say what
    it did with them.

    Args:
        report: `to_dict` of one run.
        other: of the other.
        n_permutations: see `metrics.paired_permutation`.
        alternative: likewise; "greater" asks whether the first is better.
        seed: of the draws.

    Returns:
        "auroc" and "aupr" -> the test, first minus second.

    Raises:
        InputError: another set, other images or other settings, or no image with both kinds of pixels.

    References:
        Schulthess & Konukoglu, MICCAI 2025, arXiv 2509.19997, section 3.1.4: 10 000 permutations, p < 1 %.
    """
    check_comparable(report["set"], report["settings"], other)
    rows, others = ({row["source"]: row for row in run["images"]} for run in (report, other))
    if only := sorted(rows.keys() ^ others.keys()):
        raise InputError(
            f"{len(only)} images are in one run only, {only[0]} among them; score the same images"
        )
    figures: dict[str, PairedTest] = {}
    for name in ("auroc", "aupr"):
        pairs = [(rows[s][name], others[s][name]) for s in rows if rows[s][name] is not None]
        if not pairs:
            raise InputError("no image has normal and anomalous pixels; there is nothing to compare")
        first, second = zip(*pairs, strict=True)
        figures[name] = paired_permutation(
            first, second, n_permutations=n_permutations, alternative=alternative, seed=seed
        )
    return figures


def tables(report: Report, tests: Mapping[str, PairedTest] | None = None) -> list[Table]:
    """Give the figures as tables: beside the published ones, then the thresholds, then what else there is."""
    found = [_beside(report), _thresholds(report), _figures(report)]
    if tests:
        head = ["image-wise", "difference", "p", "alternative", "images", "permutations"]
        rows = [
            [name, f"{t.difference:+.4f}", f"{t.p_value:.4g}", t.alternative, t.n_pairs, t.n_permutations]
            for name, t in tests.items()
        ]
        found.append(Table("Paired permutation test, this run minus the other", head, rows))
    return found


def _beside(report: Report) -> Table:
    pixel, settings = report.pixel, report.settings
    rates = [at.fpr for at in report.dice]
    measured = [pixel.auroc, pixel.aupr, *(at.dice for at in report.dice)]
    rows = [["this run", *(f"{100 * value:.2f}" for value in measured), ""]]
    for row in report.published:
        spread = row["deviation"] or (None, None)
        dice = (
            _cell(row["dice"][fpr], row["dice_difference"][fpr]) if fpr in row["dice"] else ""
            for fpr in rates
        )
        rows.append(
            [
                row["method"] + (" *" if row["same_model"] else ""),
                _cell(row["auroc"], row["auroc_difference"], spread[0]),
                _cell(row["aupr"], row["aupr_difference"], spread[1]),
                *dice,
                row["source"]["key"],
            ]
        )
    return Table(
        f"BMAD {report.set or report.root}: {report.model}, maps {settings['map_size']}, masks "
        f"{settings['mask_rule']}; pixels of test, percent, in brackets this run minus the published figure; "
        "* the same model",
        ["method", "AUROC", "AUPR", *(f"Dice@{fpr:.0%}" for fpr in rates), "source"],
        rows,
    )


def _cell(value: float, difference: float, deviation: float | None = None) -> str:
    spread = "" if deviation is None else f"±{deviation:.2f}"
    return f"{value:.2f}{spread} ({difference:+.2f})"


def _thresholds(report: Report) -> Table:
    head = ["asked", "threshold", "FPR on valid", "FPR on test", "Dice"]
    rows = [
        [
            f"{at.fpr:.0%}",
            f"{at.threshold.value:.6g}",
            f"{at.threshold.realized_rate:.2%}",
            f"{at.test_fpr:.2%}",
            f"{at.dice:.4f}",
        ]
        for at in report.dice
    ]
    images = report.dice[0].threshold.n_images
    what = {"pixel": "pixels", "patch": "patch scores"}[report.settings["threshold_from"]]
    return Table(f"Thresholds from the {what} of {images} normal validation images", head, rows)


def _figures(report: Report) -> Table:
    pixel, image, wise = report.pixel, report.image, report.image_wise
    rows = [["pixel average precision", f"{pixel.average_precision:.4f}"]]
    if pixel.error:
        rows.append(["largest error of the pixel rankings, from binning", f"{pixel.error:.1e}"])
    if report.pro is not None:
        rows.append(["per-region overlap, to 30 % FPR", f"{report.pro.value:.4f}"])
    if image is not None:
        rows.append(["image AUROC, AUPR", f"{image.auroc:.4f}, {image.aupr:.4f}"])
    if wise is not None:
        rows.append(
            [
                f"mean over {wise['n_images']:.0f} images of AUROC, AUPR",
                f"{wise['auroc']:.4f}, {wise['aupr']:.4f}",
            ]
        )
    spent = ", ".join(f"{stage} {1e3 * seconds:.1f}" for stage, seconds in report.seconds.items())
    rows += [
        ["images learned, scored", f"{report.n_train}, {len(report.images)}"],
        ["size of what was learned", f"{report.model_bytes / 2**20:.1f} MiB"],
        ["ms per test image", spent],
    ]
    return Table(report.backbone, ["", ""], rows)
