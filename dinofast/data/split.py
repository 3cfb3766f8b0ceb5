"""A data set split for a whole run: images to fit, to calibrate and to test on."""

from __future__ import annotations

from dataclasses import dataclass, field

from dinofast.data.sample import Mask, Sample


@dataclass(frozen=True)
class SplitSet:
    """A split of real images, and what a reader of its figures must know.

    Attributes:
        name: what it is opened by.
        citation: whom to cite.
        license: license of the data.
        note: what a reader of the figures must know.
        fit: normal images.
        calibrate: other normal images, for thresholds; empty where there are too few.
        test: labeled images, with masks where there are any.
    """

    name: str
    citation: str
    license: str
    note: str
    fit: list[Sample] = field(repr=False)
    calibrate: list[Sample] = field(repr=False)
    test: list[Sample] = field(repr=False)

    def region(self, sample: Sample) -> Mask | None:
        """Tell which pixels count when the maps are judged: bool (H, W), or None for all."""
        return None
