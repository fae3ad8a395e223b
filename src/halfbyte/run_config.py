"""Allowed values of run-time options; imports no torch, so that the command line starts quickly."""

from __future__ import annotations

HEAD_BITS = (16, 8, 4)
"""Bits of the output head on a CPU; 16: as stored, otherwise a rounded copy (nn/native_head.py)."""

ACTIVATIONS = ("float", "int8")
"""Input of quantized layers on a CPU: in the model's dtype, or int8 (kernels/cpu_int8.py)."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Dtypes that a model can compute in."""
