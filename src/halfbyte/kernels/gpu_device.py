"""What the kernels for GPUs ask of a device: its name, its size, and counters that are all 0."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

ARRIVALS = 16384
"""Counters of a launch: more blocks of channels than any layer has."""

STREAMS = 64
"""Streams of a device with counters of their own; torch has 32 of each priority."""

_pools: dict[torch.device, Tensor] = {}
_slots: dict[tuple[torch.device, int], int] = {}


def make_arrivals(device: torch.device) -> Tensor:
    """Make a device's counters, once: a CUDA graph that is being captured could not."""
    if device not in _pools:
        _pools[device] = torch.zeros(STREAMS, ARRIVALS, dtype=torch.int32, device=device)
    return _pools[device]


def find_arrivals(device: torch.device) -> Tensor:
    """Find the counters of the current stream.

    A kernel whose thread blocks share sums counts them up, and the last one sets its counter to 0
    again; launches on one stream never run at a time, those on two streams have counters apart.

    Args:
        device: Of the launch.

    Returns:
        int32 [ARRIVALS], all 0 between launches.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    slot = _slots.setdefault((device, stream), len(_slots) % STREAMS)
    return make_arrivals(device)[slot]


@functools.cache
def is_nvidia(device: torch.device) -> bool:
    """Whether the device is NVIDIA's."""
    return device.type == "cuda" and torch.version.hip is None


@functools.cache
def count_processors(device: torch.device) -> int:
    """Multiprocessors of a device; 64 where torch does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 64


@functools.cache
def name_architecture(device: torch.device) -> str:
    """Name a device's architecture: ``sm_90``; another maker's by its device type."""
    if not is_nvidia(device):
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def find_gpu_obstacle() -> str | None:
    """Say that torch finds no GPU, or None."""
    available = torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
    return None if available else "needs a GPU; torch finds none"
