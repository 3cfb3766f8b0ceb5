"""`python -m dinofast.kernels --arch 90 --json`: compile every Triton kernel; exit 1 when one fails.

`--arch 80 90 100 --record bench/results/triton-aot.json` renews the table that the tests check.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinofast.kernels.compile import Compiled
    from dinofast.kernels.tile import Variant


def compiled(variant: Variant, arch: int) -> Compiled | None:
    """Compile one variant; print why and give None when that fails."""
    from dinofast.kernels.compile import compile_variant

    try:
        return compile_variant(variant, arch)
    except Exception as error:  # Triton raises many types; each names its kernel and fails the run
        print(f"{variant.name}, sm_{arch}: {error}", file=sys.stderr)
        return None


def main() -> int:
    """Compile, print one line (or one JSON object) a kernel, and give the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dinofast.kernels", description="Compile every Triton kernel."
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[90], help="compute capabilities, such as 80 90 100"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--record", type=Path, help="also write a table to this file")
    options = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", "0") not in ("0", ""):
        print("TRITON_INTERPRET is ignored: the interpreter compiles nothing", file=sys.stderr)

    import triton
    from dinofast.kernels.compile import variants

    found = [compiled(variant, arch) for arch in options.arch for variant in variants()]
    results = [asdict(x) for x in found if x is not None]
    if options.record is not None and len(results) == len(found):
        rows = ",\n".join(json.dumps(x) for x in results)
        options.record.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{rows}\n]}}\n')
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        for x in results:
            line = (
                "{operator:36} sm_{arch:<4} {registers:4} registers {shared:7} B shared {spills:5} B spilled"
            )
            print(line.format(**x))
    return 0 if len(results) == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
