"""Make the embedded brain volumes from the PyRadiomics source archive: `python .ci/convert_brain1.py`.

NRRD says where voxels lie in LPS, NIfTI in RAS: the first two rows of the affine change sign. Voxels keep
their values and order; the label goes from int32 to uint8.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import nrrd
import numpy as np

from dinofast.data.demo import ASSETS
from dinofast.data.fetch import Archive, download, extract
from dinofast.data.nifti import write_volume

ARCHIVE = Archive(
    "pyradiomics",
    "pyradiomics-3.0.1.tar.gz",
    "47c57f441d6cb7973fa3b2ea48d3948df78e3348e1c69e1e2ff19001601fc2f5",
    34473030,
)

with tempfile.TemporaryDirectory() as name:
    work = Path(name)
    download(ARCHIVE, work / ARCHIVE.filename)
    files = extract(work / ARCHIVE.filename, ["*/data/brain1_*.nrrd", "*/LICENSE.txt"], work)
    for file, dtype in zip(
        sorted(f for f in files if f.suffix == ".nrrd"), (np.int16, np.uint8), strict=True
    ):
        voxels, header = nrrd.read(str(file))
        assert header["space"] == "left-posterior-superior"
        affine = np.eye(4)
        affine[:3] = np.column_stack([*header["space directions"], header["space origin"]])
        affine[:2] *= -1
        converted = voxels.astype(dtype)
        assert (converted == voxels).all()
        write_volume(converted, affine, ASSETS / f"{file.stem}.nii.gz")
        print(f"{file.stem}: {voxels.shape}, sum {voxels.sum(dtype=np.int64)}")
    shutil.copy(next(f for f in files if f.name == "LICENSE.txt"), ASSETS / "LICENSE-pyradiomics.txt")
