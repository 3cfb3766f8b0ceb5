"""Who offers which kernel, and when it refuses; what cannot be loaded stays in `MISSING` with its reason."""

from dinofast.ops.providers import gpu  # noqa: F401  (it offers its kernels)
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
from dinofast.ops.providers.triton import coded_kernels, on, unit_factors

__all__ = [
    "build",
    "coded_kernels",
    "has_int8",
    "instruction_set",
    "int8_columns",
    "native_k_center",
    "no_codes",
    "on",
    "quantize_bank",
    "unit_factors",
    "unit_rows",
]
