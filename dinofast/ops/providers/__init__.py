"""Who offers which kernel, and when it refuses; what cannot be loaded stays in `MISSING` with its reason."""

from dinofast.ops.providers import gpu, triton  # noqa: F401  (they offer their kernels)
from dinofast.ops.providers.cpu import (
    has_int8,
    instruction_set,
    int8_columns,
    native_k_center,
    no_codes,
    quantize_bank,
    unit_rows,
)
from dinofast.ops.providers.shared import build

__all__ = [
    "build",
    "has_int8",
    "instruction_set",
    "int8_columns",
    "native_k_center",
    "no_codes",
    "quantize_bank",
    "unit_rows",
]
