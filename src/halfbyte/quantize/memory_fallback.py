"""When memory runs out on the way: what a run gives up of speed before it gives up.

::

    out of memory -> gentler settings -> the journal -> the run goes on behind its last saved block

A plan is an estimate, and others may take memory of the same device meanwhile. So a run that runs
out of it goes on as one that was killed would, with settings that take less.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from halfbyte.errors import ConfigError
from halfbyte.quantize.resources import SMALLEST_HESSIAN_BYTES, RunSettings

CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
"""In the message of a plain RuntimeError: torch has no error of its own for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory, or the process's, did not do."""
    return isinstance(error, torch.OutOfMemoryError) or CPU_ALLOCATOR in str(error)


def find_gentler(settings: RunSettings) -> tuple[RunSettings, str] | None:
    """Choose what to give up: what takes the most memory for the least time comes first.

    Args:
        settings: With which memory ran out.

    Returns:
        Settings that take less, and what is different in words; None: there are none.
    """
    hessians = max(settings.hessian_bytes // 2, SMALLEST_HESSIAN_BYTES)
    less = replace(settings, hessian_bytes=hessians, keep_codes=False)
    if settings.keep_paused:
        return replace(less, keep_paused=False), "each block runs once per stage"
    if settings.hold_states:
        return replace(less, hold_states=False), "hidden states go through files"
    if settings.batch_size > 1:
        size = settings.batch_size // 2
        sequences = "1 sequence" if size == 1 else f"{size} sequences"
        told = f"{sequences} a batch instead of {settings.batch_size}"
        return replace(less, batch_size=size), told
    if less != settings:
        return less, "fewer Hessians at a time"
    return None


def explain_no_way(settings: RunSettings, where: str, tokens: int) -> ConfigError:
    """Say what the user can do where nothing gentler is left.

    Args:
        settings: The gentlest.
        where: In the run, in words.
        tokens: Of the longest sequence.

    Returns:
        The error.
    """
    return ConfigError(
        f"{settings.device} ran out of memory {where}, with {settings.batch_size} of the sequences "
        f"of up to {tokens} tokens at a time. Free memory on it and go on with --resume, or begin "
        "anew with shorter sequences (--length) or on another device (--device)."
    )
