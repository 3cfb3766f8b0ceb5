"""How well scores tell abnormal from normal: rankings, Dice, per-region overlap, paired tests."""

from dinofast.metrics.dice import PooledDice
from dinofast.metrics.permutation import PairedTest, paired_permutation
from dinofast.metrics.ranking import aupr, auroc, average_precision
from dinofast.metrics.regions import RegionOverlap
from dinofast.metrics.streamed import Bounded, StreamedRanking

__all__ = [
    "Bounded",
    "PairedTest",
    "PooledDice",
    "RegionOverlap",
    "StreamedRanking",
    "aupr",
    "auroc",
    "average_precision",
    "paired_permutation",
]
