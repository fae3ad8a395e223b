"""Device queries and per-stream arrival counters for the GPU kernels."""

from __future__ import annotations

import functools
import threading
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

ARRIVALS = 16384
"""Counters per launch; more than the channel blocks of any layer."""

STREAMS = 64
"""Streams to allocate counters for at a time; torch has 32 per priority."""

NULL_CONTEXT = nullcontext()
"""A shared no-op context manager."""

_counters: dict[tuple[torch.device, int], Tensor] = {}
_spare: dict[torch.device, list[Tensor]] = {}
_lock = threading.Lock()


def make_arrivals(device: torch.device) -> None:
    """Allocate counters for a device's streams now: CUDA graph capture cannot."""
    with _lock:
        _find_spare(device)


def _find_spare(device: torch.device) -> list[Tensor]:
    """Return unassigned counters; allocate more if there are none."""
    spare = _spare.setdefault(device, [])
    if not spare:
        spare += torch.zeros(STREAMS, ARRIVALS, dtype=torch.int32, device=device).unbind()
        # They are zeroed on this stream but used on others.
        torch.get_device_module(device).synchronize(device)
    return spare


def find_arrivals(device: torch.device) -> Tensor:
    """Return the arrival counters of the current stream.

    Thread blocks that share a sum increment a counter on arrival, and the last one resets it to 0.
    Launches on one stream never overlap; launches on different streams use different counters. A
    CUDA graph keeps the counters of the stream it was captured on, so no other work of that stream
    may run while the graph is replayed.

    Args:
        device: Device of the launch.

    Returns:
        int32 [ARRIVALS], all 0 between launches.
    """
    is_cpu = device.type == "cpu"
    stream = 0 if is_cpu else torch.get_device_module(device).current_stream(device).stream_id
    found = _counters.get((device, stream))
    if found is None:
        with _lock:
            found = _counters[device, stream] = _find_spare(device).pop()
    return found


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Return a context manager that makes a device torch's current one, which Triton launches on.

    Args:
        device: Device of the tensors.

    Returns:
        The context manager; a no-op on a CPU or if the device is current already.
    """
    module = torch.get_device_module(device)
    if device.type == "cpu" or module.current_device() == device.index:
        return NULL_CONTEXT
    found: AbstractContextManager[object] = module.device(device)
    return found


@functools.cache
def starts_early(device: torch.device) -> bool:
    """Whether the device supports programmatic dependent launch."""
    return is_nvidia(device) and torch.cuda.get_device_capability(device) >= (9, 0)


def early_options(device: torch.device) -> dict[str, bool]:
    """Return the launch options of a Triton kernel that can use programmatic dependent launch."""
    return {"EARLY": True, "launch_pdl": True} if starts_early(device) else {"EARLY": False}


@functools.cache
def is_nvidia(device: torch.device) -> bool:
    """Whether the device is an NVIDIA GPU."""
    return device.type == "cuda" and torch.version.hip is None


@functools.cache
def is_amd(device: torch.device) -> bool:
    """Whether the device is an AMD GPU, which torch calls ``cuda`` too."""
    return device.type == "cuda" and torch.version.hip is not None


@functools.cache
def count_processors(device: torch.device) -> int:
    """Count the multiprocessors of a device; 64 if torch does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 64


@functools.cache
def name_architecture(device: torch.device) -> str:
    """Return a device's architecture, such as ``sm_90`` or ``gfx942``, or its device type."""
    if is_amd(device):
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    if not is_nvidia(device):
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def find_gpu_obstacle() -> str | None:
    """Return that torch finds no GPU; None if it finds one."""
    available = torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())
    return None if available else "needs a GPU; torch finds none"
