"""What the kernels for GPUs ask of a device: its name, its size, and counters that are all 0."""

from __future__ import annotations

import functools
import threading
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

ARRIVALS = 16384
"""Counters of a launch: more blocks of channels than any layer has."""

STREAMS = 64
"""Streams that counters are made for at a time; torch has 32 of each priority."""

AS_IT_IS = nullcontext()
"""For a ``with`` that changes nothing."""

_counters: dict[tuple[torch.device, int], Tensor] = {}
_spare: dict[torch.device, list[Tensor]] = {}
_lock = threading.Lock()


def make_arrivals(device: torch.device) -> None:
    """Make counters for a device's streams: while a CUDA graph is captured none can be made."""
    with _lock:
        _find_spare(device)


def _find_spare(device: torch.device) -> list[Tensor]:
    """Counters of no stream yet, of one at least."""
    spare = _spare.setdefault(device, [])
    if not spare:
        spare += torch.zeros(STREAMS, ARRIVALS, dtype=torch.int32, device=device).unbind()
        # They are set to 0 on this stream, and counted up on others.
        torch.get_device_module(device).synchronize(device)
    return spare


def find_arrivals(device: torch.device) -> Tensor:
    """Find the counters of the current stream.

    A kernel whose thread blocks share sums counts them up, and the last one sets its counter to 0
    again; launches on one stream never run at a time, those on two streams have counters apart.
    What a CUDA graph recorded keeps the counters of the stream it was recorded on: wherever it is
    replayed, nothing else of that stream may run meanwhile.

    Args:
        device: Of the launch.

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
    """Make a device torch's current one: Triton launches on that, wherever its tensors are.

    Args:
        device: Of the tensors.

    Returns:
        For a ``with``, in which it is; nothing is done where it is already, or on a CPU.
    """
    module = torch.get_device_module(device)
    if device.type == "cpu" or module.current_device() == device.index:
        return AS_IT_IS
    found: AbstractContextManager[object] = module.device(device)
    return found


@functools.cache
def starts_early(device: torch.device) -> bool:
    """Whether launches on a device may begin while the one before still runs."""
    return is_nvidia(device) and torch.cuda.get_device_capability(device) >= (9, 0)


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
