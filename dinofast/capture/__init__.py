"""The path from resized images to maps, recorded once for each size and replayed; see `Detector.capture`."""

from dinofast.capture.captured import Captured
from dinofast.capture.recorder import CudaRecorder, Recorder

__all__ = ["Captured", "CudaRecorder", "Recorder"]
