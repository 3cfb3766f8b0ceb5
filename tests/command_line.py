"""What the tests of the command line share; the fixtures `call` and `tree` are in conftest.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

LITE = ("--backbone", "efficientnet-lite0", "--size", "96")
"""Options for the backbone of the fixture `lite0`."""


class Result(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Result]


def whole(folder: Path) -> list[Path]:
    """Read every file that a run left; none may be half-written or temporary."""
    import nibabel
    import numpy as np
    from PIL import Image

    found = [path for path in folder.rglob("*") if path.is_file()]
    for path in found:
        assert not path.name.startswith(".writing-"), path
        if path.suffix in (".png", ".tif"):
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith(">")
        else:
            assert path.name.endswith(".nii.gz"), path
            assert np.isfinite(nibabel.load(path).get_fdata()).all()
    return found
