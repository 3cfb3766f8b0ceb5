"""Peak extra memory of a contender's second call, in a process of its own: the first sets its library up.

What a `Bank` holds beside its rows counts as extra, although it is prepared before the call.

`python -m bench.memory cosine_max image_1024x150 dinofast` prints bytes, or -1 where it cannot be told.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

from bench.dpmm import step_calls
from bench.peers import contenders
from bench.shapes import SHAPES
from dinofast.ops import Bank


def peak_extra(op: str, shape: str, contender: str) -> int | None:
    """Measure in a fresh process; bytes, or None where the system does not tell (needs Linux)."""
    command = [sys.executable, "-m", "bench.memory", op, shape, contender]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True, timeout=3600
    )
    found = int(done.stdout)
    return None if found < 0 else found


def resident(field: str) -> int:
    """Read a field of this process's memory, such as VmRSS now or VmHWM at its highest; bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def _main(op: str, shape: str, contender: str) -> int:
    if op == "DPMM.step":
        call = step_calls()[contender]
    else:
        args = SHAPES[op][shape]()
        call = next(c for c in contenders(op, shape) if c.name == contender).prepare(*args)
    if not Path("/proc/self/clear_refs").exists():
        return -1
    call()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory of the preparation must not hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before + prepared_bytes(call)


def prepared_bytes(call: object) -> int:
    """Count what a `Bank` that the call searches holds beside its rows; it was prepared before the call."""
    held = [x for x in getattr(call, "args", ()) if isinstance(x, Bank)]
    return sum(bank.nbytes - bank.rows.nbytes for bank in held)


if __name__ == "__main__":
    print(_main(*sys.argv[1:]))
