"""Figures that papers report for BMAD's sets with pixel masks; percent, one table, with their sources.

Pixels of the whole test split are pooled. The sources differ in what they call AUPR and in the size at which
maps and masks are compared, see `Source`. Rows that one source repeats from another stand once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Source:
    """Where rows come from and how their figures were made.

    Attributes:
        key: in a word, for tables.
        name: whom to cite.
        aupr: "aupr", the trapezoidal area, or "average_precision"; "aupr" where not stated.
        map_size: size at which maps are compared with masks: "native", "240", or None where not stated.
        gpu: what runtimes and memory were measured on, None where not stated.
    """

    key: str
    name: str
    aupr: str
    map_size: str | None
    gpu: str | None

    def __str__(self) -> str:
        """Say it in one line for people."""
        kind = {"aupr": "trapezoidal AUPR", "average_precision": "average precision"}[self.aupr]
        how = f"{kind}, maps {self.map_size}"
        if self.map_size is None:
            how = f"kind of AUPR and size of maps not stated, compared with the {kind}"
        return f"{self.key}: {self.name}; {how}"


@dataclass(frozen=True)
class Row:
    """One method on one set; percent.

    Attributes:
        method: as the source calls it.
        model: name in `dinofast.models` of the same method, None where there is none.
        source: where it comes from.
        auroc: pixel AUROC, mean of runs where there are several.
        aupr: area under the precision-recall curve, of the kind that `source.aupr` says.
        deviation: standard deviations of the two over runs; None for one run.
        dice: false-positive rate -> micro Dice, empty where not reported.
        runtime_ms: milliseconds an image at batch 1, None where not reported.
        memory_gb: GPU memory, None where not reported.
    """

    method: str
    model: str | None
    source: Source
    auroc: float
    aupr: float
    deviation: tuple[float, float] | None
    dice: dict[float, float]
    runtime_ms: float | None
    memory_gb: float | None


DPMM = Source(
    "DPMM",
    "Schulthess & Konukoglu, MICCAI 2025, arXiv 2509.19997, tables 1 and 2",
    "aupr",
    "native",
    "NVIDIA A6000 48 GB",
)
SPATIAL_AR = Source(
    "AR", "project page of arXiv 2603.02974, its own method", "average_precision", "240", None
)
BASELINES = Source("AR+", "project page of arXiv 2603.02974, its baselines", "aupr", None, None)
SOURCES = (DPMM, SPATIAL_AR, BASELINES)

SETS = ("brain", "liver", "resc")
DICE_RATES = (0.1, 0.05, 0.01)

_Figures = tuple[float, ...] | None
_NONE = (None, None)
_TABLE: dict[Source, dict[tuple[str, str | None], tuple[_Figures, _Figures, _Figures]]] = {
    # (method, model): on each of SETS AUROC, AUPR and perhaps their deviations; None where it did not run
    DPMM: {
        ("DPMM", "dpmm"): ((96.21, 43.43), (95.46, 9.02), (90.20, 41.66)),
        ("AnomalyDINO, full bank", "memory_bank"): ((97.71, 58.69), (97.24, 17.91), (94.04, 50.45)),
        ("AnomalyDINO, 1 shot, mean of 25", "memory_bank"): ((94.61, 31.21), (94.60, 5.98), (89.52, 36.98)),
        ("PatchCore R18, 10 %", "patchcore"): ((98.34, 67.37), (96.67, 5.66), (97.08, 70.47)),
        ("PatchCore WRN50, 10 %", "patchcore"): (None, (96.63, 5.99), (97.55, 72.62)),
        ("PatchCore WRN50, 1024 prototypes", "patchcore"): ((95.38, 55.07), (45.70, 0.32), (93.28, 61.88)),
        ("PatchCore WRN50, 150 prototypes", "patchcore"): ((95.02, 42.68), (16.31, 0.23), (78.70, 25.98)),
    },
    SPATIAL_AR: {
        ("AR, standard convolutions", "spatial_ar"): (
            (97.87, 64.70, 0.24, 3.56), (97.32, 8.44, 0.24, 1.09), (94.39, 56.16, 0.10, 1.08)),
        ("AR, dilated convolutions", "spatial_ar"): (
            (98.35, 72.42, 0.02, 0.47), (96.39, 5.51, 0.04, 0.26), (93.09, 42.34, 0.19, 1.07)),
    },
    BASELINES: {
        ("AnomalyDINO v3-S", "memory_bank"): ((98.38, 69.49), (96.98, 5.35), (96.93, 63.40)),
        ("DPMM v2-S", "dpmm"): (
            (91.16, 29.18, 3.72, 6.74), (96.30, 7.05, 0.94, 1.78), (86.47, 34.99, 1.84, 2.79)),
        ("DPMM v3-S", "dpmm"): (
            (96.12, 48.09, 0.55, 6.62), (90.48, 1.94, 1.05, 0.25), (86.94, 37.70, 7.76, 17.83)),
        ("RD4AD", None): (
            (97.85, 52.98, 0.05, 1.25), (95.54, 4.71, 1.73, 1.80), (96.84, 64.77, 0.23, 3.33)),
        ("STFPM", None): (
            (96.84, 43.86, 0.58, 5.28), (96.30, 5.44, 0.15, 0.29), (95.11, 54.10, 0.31, 1.02)),
        ("PatchCore", "patchcore"): (None, (96.63, 6.00, 0.00, 0.01), (97.57, 72.77, 0.01, 0.06)),
        ("CFA", None): ((97.33, 54.67, 0.09, 0.69), (97.14, 7.13, 0.13, 0.41), (93.11, 30.84, 0.02, 0.09)),
        ("CFLOW", None): (
            (94.93, 34.99, 0.71, 6.26), (92.88, 3.46, 2.17, 0.70), (94.68, 52.23, 0.05, 1.19)),
        ("PaDiM", None): ((83.59, 7.02, 0.80, 0.32), (90.35, 1.76, 0.17, 0.03), (91.88, 33.09, 0.07, 1.73)),
        ("DRAEM", None): (
            (63.85, 14.61, 16.37, 7.94), (89.42, 7.03, 4.96, 4.79), (88.81, 38.05, 3.95, 9.94)),
        ("UTRAD", None): ((47.47, 3.11, 3.78, 0.25), (85.54, 1.36, 0.36, 0.04), (94.62, 49.57, 0.11, 1.20)),
    },
}  # fmt: skip
_DICE = {  # at DICE_RATES, on each of SETS
    "DPMM": ((31.64, 41.45, 45.87), (6.19, 8.52, 14.76), (38.00, 43.74, 43.49)),
    "AnomalyDINO, full bank": ((29.26, 38.16, 54.24), (7.19, 10.48, 18.69), (39.28, 45.82, 52.30)),
    "AnomalyDINO, 1 shot, mean of 25": ((31.89, 37.45, 32.98), (6.17, 8.20, 10.63), (36.48, 40.34, 33.88)),
}
_COSTS: dict[Source, dict[str, tuple[tuple[float | None, float | None], ...]]] = {
    # milliseconds and GB on each of SETS
    DPMM: {
        "DPMM": ((39, 1.6), (35, 1.5), (58, 2.0)),
        "AnomalyDINO, full bank": ((422, 33.1), (107, 6.9), (984, 38.1)),
        "AnomalyDINO, 1 shot, mean of 25": ((24, 0.2), (26, 0.2), (49, 0.4)),
        "PatchCore R18, 10 %": ((202, 3.4), (132, 0.7), (150, 2.0)),
        "PatchCore WRN50, 10 %": (_NONE, (160, 1.9), (218, 5.0)),
        "PatchCore WRN50, 1024 prototypes": ((149, 0.2), (130, 0.1), (132, 0.1)),
        "PatchCore WRN50, 150 prototypes": ((158, 0.2), (139, 0.1), (136, 0.1)),
    },
    # The page has one runtime a method; those that DPMM's table also has are its runtimes on RESC.
    SPATIAL_AR: {
        "AR, standard convolutions": (_NONE, _NONE, (20, None)),
        "AR, dilated convolutions": (_NONE, _NONE, (20, None)),
    },
    BASELINES: {
        method: (_NONE, _NONE, (runtime, None))
        for method, runtime in {
            "AnomalyDINO v3-S": 585, "DPMM v2-S": 58, "DPMM v3-S": 149, "RD4AD": 117, "STFPM": 111,
            "PatchCore": 218, "CFA": 116, "CFLOW": 219, "PaDiM": 129, "DRAEM": 130, "UTRAD": 42,
        }.items()
    },
}  # fmt: skip


def rows(name: str | None) -> list[Row]:
    """Give every published row of a set, "brain", "liver" or "resc"; none of any other."""
    if name not in SETS:
        return []
    found, at = [], SETS.index(name)
    for source, table in _TABLE.items():
        for (method, model), sets in table.items():
            if (figures := sets[at]) is None:
                continue
            auroc, aupr, *spread = figures
            dice = _DICE[method][at] if source is DPMM and method in _DICE else ()
            runtime_ms, memory_gb = _COSTS[source][method][at]
            found.append(
                Row(
                    method=method,
                    model=model,
                    source=source,
                    auroc=auroc,
                    aupr=aupr,
                    deviation=(spread[0], spread[1]) if spread else None,
                    dice=dict(zip(DICE_RATES, dice, strict=False)),
                    runtime_ms=runtime_ms,
                    memory_gb=memory_gb,
                )
            )
    return found


def compared(
    name: str | None, model: str, pixel: Mapping[str, float], dice: Mapping[float, float], map_size: str
) -> list[dict[str, Any]]:
    """Set measured figures beside the published ones of a set.

    Args:
        name: the set.
        model: name of the model that was measured.
        pixel: "auroc", "aupr" and "average_precision" of pixels, in [0, 1].
        dice: false-positive rate -> Dice, in [0, 1], at each of `DICE_RATES`.
        map_size: the size at which they were measured.

    Returns:
        One dict a row, those of the same model first: the fields of `Row`; `same_model`; `same_size`, None
        where the source does not say; and `auroc_difference`, `aupr_difference` and `dice_difference`,
        measured minus published in percentage points. Where a source reports average precision, that is what
        it is compared with.
    """
    found = [
        {
            **asdict(row),
            "same_model": row.model == model,
            "same_size": None if row.source.map_size is None else row.source.map_size == map_size,
            "auroc_difference": 100 * pixel["auroc"] - row.auroc,
            "aupr_difference": 100 * pixel[row.source.aupr] - row.aupr,
            "dice_difference": {fpr: 100 * dice[fpr] - value for fpr, value in row.dice.items()},
        }
        for row in rows(name)
    ]
    return sorted(found, key=lambda row: not row["same_model"])
