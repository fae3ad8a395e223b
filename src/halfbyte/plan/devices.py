"""Devices by memory size, and what fits on each."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from halfbyte.errors import ConfigError
from halfbyte.machine.limits import available_memory_bytes
from halfbyte.plan.memory import BITS, Load, MemoryPlan, plan_memory
from halfbyte.plan.shapes import ModelShapes

GIB = 1 << 30

GPUS = {
    "RTX 2060": 6, "RTX 4060": 8, "RTX 3080": 10, "RTX 4070": 12, "T4": 16, "RTX 4080": 16,
    "A10G": 24, "L4": 24, "RTX 3090": 24, "RTX 4090": 24, "RTX 5090": 32, "A100 40GB": 40,
    "L40S": 48, "RTX A6000": 48, "A100": 80, "H100": 80, "H200": 141, "MI300X": 192, "B200": 180,
}  # fmt: skip
"""Common GPUs and their memory in GiB, as vendors state it ("GB")."""

SIZES = (6, 8, 10, 12, 16, 24, 32, 40, 48, 80, 141)
"""GPU sizes in GiB that are listed when the user names no GPU."""
USABLE = 0.92
"""Usable fraction of a GPU's memory; the rest goes to the driver and to fragmentation."""
COUNTS = (1, 2, 4, 8)
"""Numbers of GPUs that a model can be split over (tensor parallelism)."""
SPLIT_OVERHEAD_BYTES = 300_000_000
"""Communication buffers per GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Memory that a model could be placed in."""

    name: str
    bytes: int
    """Usable memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How a model fits one device under a given load."""

    device: Device
    fits: bool
    free_bytes: int
    """Memory left over; negative if the model does not fit."""
    max_requests: int
    """Concurrent requests that fit at the requested context; 0 if not even one does."""
    max_context: int
    """Longest context that fits for the requested number of requests."""
    bits: int | None
    """Largest of ``BITS``, up to 16, that fits under this load; None if none does."""
    cards: int | None
    """How many GPUs of this size hold the model together, of ``COUNTS``; None if 8 are too few."""


def parse_device(text: str) -> Device:
    """Parse a GPU given by memory size or by name.

    Args:
        text: A size such as "24GB" (as vendors state it, so GiB), or a name such as "RTX 4090".

    Returns:
        The device, with its usable memory.

    Raises:
        ConfigError: The text is neither.
    """

    def normalize(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.casefold())

    for name, size in GPUS.items():
        if normalize(text) in (normalize(name), normalize(name).removeprefix("rtx")):
            return _gpu(name, size)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:[gG]i?[bB]?)?\s*", text)
    if match:
        return _gpu(f"{float(match[1]):g} GB card", float(match[1]))
    raise ConfigError(
        f"gpu is '{text}'; use a memory size such as 24GB, or one of {', '.join(GPUS)}."
    )


def _gpu(name: str, size: float) -> Device:
    return Device(name=name, bytes=int(size * GIB * USABLE))


def usual_devices() -> list[Device]:
    """Return GPUs of common memory sizes."""
    return [_gpu(f"{size} GB card", size) for size in SIZES]


def this_machine() -> Device:
    """Return this machine, with the memory that is available now."""
    return Device(name="this machine", bytes=available_memory_bytes())


def fit_devices(shapes: ModelShapes, load: Load, devices: Sequence[Device]) -> list[Fit]:
    """Determine for each device whether the model fits under a load, and what would fit.

    Args:
        shapes: The model.
        load: The expected workload.
        devices: Candidate devices.

    Returns:
        One result per device, in their order.
    """
    return [_fit(shapes, load, device) for device in devices]


def _fit(shapes: ModelShapes, load: Load, device: Device) -> Fit:
    plan = plan_memory(shapes, load)
    free = device.bytes - plan.total
    bits = [
        b
        for b in BITS
        if b <= 16 and plan_memory(shapes, replace(load, bits=b)).total <= device.bytes
    ]
    return Fit(
        device=device,
        fits=free >= 0,
        free_bytes=free,
        max_requests=_largest(
            lambda n: _total_bytes(shapes, replace(load, requests=n)) <= device.bytes
        ),
        max_context=min(
            _largest(lambda n: _total_bytes(shapes, replace(load, context=n)) <= device.bytes),
            shapes.context or 1 << 40,
        ),
        bits=max(bits, default=None),
        cards=next((n for n in COUNTS if _bytes_per_card(plan, n) <= device.bytes), None),
    )


def _total_bytes(shapes: ModelShapes, load: Load) -> int:
    return plan_memory(shapes, load).total


def _bytes_per_card(plan: MemoryPlan, cards: int) -> int:
    """Return what each of several GPUs holds: weights and cache are divided, the rest is not."""
    communication = SPLIT_OVERHEAD_BYTES if cards > 1 else 0
    return (plan.weights + plan.cache) // cards + plan.activations + plan.program + communication


def _largest(fits: Callable[[int], bool]) -> int:
    """Return the largest integer that fits, by binary search up to 2**25; 0 if 1 does not fit."""
    if not fits(1):
        return 0
    high = 1
    while fits(2 * high) and high < 1 << 24:
        high *= 2
    low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
