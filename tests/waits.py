"""What on a GPU would wait for values: refused while kernels run in Triton's interpreter, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dinofast.capture.static import StaticOnly

READS = (
    "item",
    "tolist",
    "cpu",
    "cuda",
    "numpy",
    "__array__",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
)
"""What takes values from a tensor; on the CPU most of these are no operation that torch dispatches."""


SETUP = """
import warnings
import torch
warnings.filterwarnings("ignore", "(invalid value|overflow) encountered")  # numpy, on broken rows
from dinofast import ops
from dinofast.ops.registry import OPS
from waits import nothing_waits

draw = torch.Generator().manual_seed(3)
"""

TELL = """
import json
import traceback
from dinofast.testing import as_tuple

def tell(cases, run):
    found = dict.fromkeys(cases, "")
    for name, case in cases.items():
        try:
            run(name, case)
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))
"""


class Reads(TorchFunctionMode):
    """Refuses what takes values from a tensor."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for name in READS:
            if func is getattr(torch.Tensor, name, None):
                raise AssertionError(f"Tensor.{name} waits for the device")
        return func(*args, **kwargs or {})


@contextmanager
def nothing_waits(name: str = "this") -> Iterator[None]:
    """Fail at the first operation inside that waits, by InputError or AssertionError."""
    with StaticOnly(name), Reads():
        yield


def interpret(code: str) -> str:
    """Run a script with this module in a process whose kernels the interpreter runs; give what it prints."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SETUP + code],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.fspath(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def told(code: str) -> dict[str, str]:
    """Run a script that calls `tell`, which calls a function for each case; what went wrong, case by case."""
    found: dict[str, str] = json.loads(interpret(TELL + code).splitlines()[-1])
    return found
