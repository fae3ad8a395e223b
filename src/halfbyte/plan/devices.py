"""Devices with their memory, and what fits on them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from halfbyte.errors import ConfigError
from halfbyte.plan.memory import BITS, Load, MemoryPlan, plan_memory
from halfbyte.plan.shapes import ModelShapes

GIB = 1 << 30

GPUS = {
    "RTX 2060": 6, "RTX 4060": 8, "RTX 3080": 10, "RTX 4070": 12, "T4": 16, "RTX 4080": 16,
    "A10G": 24, "L4": 24, "RTX 3090": 24, "RTX 4090": 24, "RTX 5090": 32, "A100 40GB": 40,
    "L40S": 48, "RTX A6000": 48, "A100": 80, "H100": 80, "H200": 141, "MI300X": 192, "B200": 180,
}  # fmt: skip
"""Well-known cards and their memory in GiB, as makers print it ("GB")."""

SIZES = (6, 8, 10, 12, 16, 24, 32, 40, 48, 80, 141)
"""What is shown where no card was named."""
USABLE = 0.92
"""Of a card's memory: the rest is the driver's, or lost between pieces."""
COUNTS = (1, 2, 4, 8)
"""Cards over which a model can be split by heads."""
SPLIT_OVERHEAD_BYTES = 300_000_000
"""Per card: buffers for talking to the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Memory that a model could go into."""

    name: str
    bytes: int
    """That can be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """One device under one load."""

    device: Device
    fits: bool
    free_bytes: int
    """Left over; negative where it does not fit."""
    max_requests: int
    """At the asked context; 0 where not even the weights fit."""
    max_context: int
    """For the asked number of requests."""
    bits: int | None
    """Most bits of ``BITS`` up to 16 that fit under this load; None: none does."""
    cards: int | None
    """Cards of this size that hold it together, of 1, 2, 4, 8; None: more than that."""


def parse_device(text: str) -> Device:
    """Read a device as the user writes it.

    Args:
        text: A size such as "24GB" (as printed on the card, so GiB), or a card such as "RTX 4090".

    Returns:
        The device, with the share of its memory that can be used.

    Raises:
        ConfigError: It is neither.
    """

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.casefold())

    for name, size in GPUS.items():
        if plain(text) in (plain(name), plain(name).removeprefix("rtx")):
            return _gpu(name, size)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:[gG]i?[bB]?)?\s*", text)
    if match:
        return _gpu(f"{float(match[1]):g} GB card", float(match[1]))
    raise ConfigError(f"gpu is '{text}'; write a size such as 24GB, or one of {', '.join(GPUS)}.")


def _gpu(name: str, size: float) -> Device:
    return Device(name=name, bytes=int(size * GIB * USABLE))


def usual_devices() -> list[Device]:
    """Give cards of the usual sizes."""
    return [_gpu(f"{size} GB card", size) for size in SIZES]


def this_machine() -> Device:
    """Give the memory of this machine that programs can have now."""
    import psutil

    return Device(name="this machine", bytes=int(psutil.virtual_memory().available))


def fit_devices(shapes: ModelShapes, load: Load, devices: Sequence[Device]) -> list[Fit]:
    """Say for each device whether the model fits under the load, and what would.

    Args:
        shapes: The model.
        load: How it is to be used.
        devices: Where it could run.

    Returns:
        One answer per device.
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
        max_requests=_largest(lambda n: _needs(shapes, replace(load, requests=n)) <= device.bytes),
        max_context=min(
            _largest(lambda n: _needs(shapes, replace(load, context=n)) <= device.bytes),
            shapes.context or 1 << 40,
        ),
        bits=max(bits, default=None),
        cards=next((n for n in COUNTS if _share(plan, n, shapes) <= device.bytes), None),
    )


def _needs(shapes: ModelShapes, load: Load) -> int:
    return plan_memory(shapes, load).total


def _share(plan: MemoryPlan, cards: int, shapes: ModelShapes) -> int:
    """Give what one of several cards holds: blocks and cache are divided, embeddings are too."""
    talk = SPLIT_OVERHEAD_BYTES if cards > 1 else 0
    return (plan.weights + plan.cache) // cards + plan.activations + plan.program + talk


def _largest(fits: Callable[[int], bool]) -> int:
    """Give the largest whole number that fits, by doubling and halving; 0 where 1 does not."""
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
