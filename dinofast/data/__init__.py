"""Images, folders and volumes as lists of samples; nothing is read before it is asked for."""

from dinofast.data import bmad, demo
from dinofast.data.folder import folder
from dinofast.data.nifti import Volume, volume
from dinofast.data.sample import Sample, VolumeSlice
from dinofast.data.sources import check, judged, reading, samples, shots

__all__ = [
    "Sample",
    "Volume",
    "VolumeSlice",
    "bmad",
    "check",
    "demo",
    "folder",
    "judged",
    "reading",
    "samples",
    "shots",
    "volume",
]
