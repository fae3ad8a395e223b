"""Settings that use less memory, for a run that ran out of it.

::

    out of memory -> reduced settings -> journal -> resume after the last saved block

The memory plan is an estimate, and other processes may use the same device. So a run that runs out
of memory resumes like a killed one, with settings that trade speed for memory.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from halfbyte.errors import ConfigError
from halfbyte.quantize.resources import SMALLEST_HESSIAN_BYTES, RunSettings

CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
"""Part of the message of a plain RuntimeError; torch has no specific error for the CPU."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory of a device or of the process ran out."""
    return isinstance(error, torch.OutOfMemoryError) or CPU_ALLOCATOR in str(error)


def reduce_memory(settings: RunSettings) -> tuple[RunSettings, str] | None:
    """Choose settings that use less memory; the best ratio of memory saved to time comes first.

    Args:
        settings: The settings with which memory ran out.

    Returns:
        The reduced settings and a description of the change; None if nothing can be reduced.
    """
    hessian_bytes = max(settings.hessian_bytes // 2, SMALLEST_HESSIAN_BYTES)
    reduced = replace(settings, hessian_bytes=hessian_bytes, keep_codes=False)
    if settings.keep_paused:
        return replace(reduced, keep_paused=False), "each block runs once per stage"
    if settings.hold_states:
        return replace(reduced, hold_states=False), "hidden states are kept in files"
    if settings.batch_size > 1:
        size = settings.batch_size // 2
        sequences = "1 sequence" if size == 1 else f"{size} sequences"
        change = f"{sequences} per batch instead of {settings.batch_size}"
        return replace(reduced, batch_size=size), change
    if reduced != settings:
        return reduced, "fewer Hessians at a time"
    return None


def build_out_of_memory_error(settings: RunSettings, where: str, tokens: int) -> ConfigError:
    """Build the error for a run that is out of memory with the most reduced settings.

    Args:
        settings: The most reduced settings.
        where: Where in the run, such as "in block 3 of 12".
        tokens: Length of the longest sequence.

    Returns:
        The error, with advice.
    """
    return ConfigError(
        f"{settings.device} ran out of memory {where}, with a batch size of {settings.batch_size} "
        f"and sequences of up to {tokens} tokens. Free memory on it and continue with --resume, or "
        "start again with shorter sequences (--length) or on another device (--device)."
    )
