"""How much memory this process, or the GPU that it computes on, has in use while something runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from halfbyte.machine.memory import resident_memory_bytes

SAMPLE_SECONDS = 0.005
"""Between two looks."""


class MemoryMeter:
    """Looks at this process's resident memory, or at a GPU's."""

    def __init__(self, device: torch.device) -> None:
        """Say where to look.

        Args:
            device: What computes; a GPU that stands idle beside it says nothing of the run.
        """
        self._device = device

    def now(self) -> int:
        """Give the present size. Unit: bytes."""
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            return total - free
        return resident_memory_bytes()

    @contextmanager
    def watch(self, seconds: float = SAMPLE_SECONDS) -> Iterator[Callable[[], list[int]]]:
        """Look again and again while something runs.

        Args:
            seconds: Between two looks.

        Yields:
            A function that gives all sizes seen so far.
        """
        seen = [self.now()]
        done = threading.Event()

        def look() -> None:
            while not done.wait(seconds):
                seen.append(self.now())

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield lambda: seen
        finally:
            done.set()
            watcher.join()
            seen.append(self.now())
