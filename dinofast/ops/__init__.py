"""Operators: declared once, computed by the fastest kernel that can serve the call."""

from dinofast.ops.cosine_max import cosine_max
from dinofast.ops.registry import MISSING, OPS, backend

__all__ = ["MISSING", "OPS", "backend", "cosine_max"]
