"""What running a model can be asked for; without torch, so that the command line starts at once."""

from __future__ import annotations

HEAD_BITS = (16, 8, 4)
"""Of the output layer on a CPU; 16: as stored, else a rounded copy (nn/native_head.py)."""

ACTIVATIONS = ("float", "int8")
"""Input of quantized layers on a CPU: in the model's own type, or rounded (kernels/cpu_int8.py)."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Types in which a model computes."""
