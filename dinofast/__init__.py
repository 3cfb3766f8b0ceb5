"""dinofast: DINO patch features to anomaly maps; exact, calibrated, fast.

`import dinofast` is cheap: torch and the native kernels load when a room is first used.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinofast import backbone, data, metrics, models, ops
    from dinofast.detector import Detector
    from dinofast.memory_plan import Plan, plan
    from dinofast.types import Features, Prediction, Scores

try:
    __version__ = version("dinofast")
except PackageNotFoundError as error:
    raise ImportError("this source tree is not installed; run pip install -e .") from error

__all__ = [
    "Detector",
    "Features",
    "Plan",
    "Prediction",
    "Scores",
    "__version__",
    "backbone",
    "data",
    "metrics",
    "models",
    "ops",
    "plan",
]

_ROOMS = ("backbone", "data", "metrics", "models", "ops")
_NAMES = {
    "Detector": "dinofast.detector",
    "Features": "dinofast.types",
    "Plan": "dinofast.memory_plan",
    "Prediction": "dinofast.types",
    "Scores": "dinofast.types",
    "plan": "dinofast.memory_plan",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"dinofast.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'dinofast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
