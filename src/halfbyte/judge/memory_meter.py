"""Samples the memory use of this process, or of the GPU it computes on, while something runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from halfbyte.machine.memory import resident_memory_bytes

SAMPLE_SECONDS = 0.005
"""Time between two samples."""


class MemoryMeter:
    """Measures this process's resident memory, or a GPU's memory in use."""

    def __init__(self, device: torch.device) -> None:
        """Select what is measured.

        Args:
            device: The device that computes; another, idle GPU is not measured.
        """
        self._device = device

    def now(self) -> int:
        """Return the current memory use. Unit: bytes."""
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            return total - free
        return resident_memory_bytes()

    @contextmanager
    def watch(self, seconds: float = SAMPLE_SECONDS) -> Iterator[Callable[[], list[int]]]:
        """Sample the memory use in a thread.

        Args:
            seconds: Time between two samples.

        Yields:
            A function that returns all samples so far.
        """
        samples = [self.now()]
        done = threading.Event()

        def sample() -> None:
            while not done.wait(seconds):
                samples.append(self.now())

        watcher = threading.Thread(target=sample, daemon=True)
        watcher.start()
        try:
            yield lambda: samples
        finally:
            done.set()
            watcher.join()
            samples.append(self.now())
