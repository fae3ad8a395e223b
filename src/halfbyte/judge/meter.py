"""How much memory this process, or the GPU, has in use while something runs."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from halfbyte.errors import ModelError
from halfbyte.quantize.provenance import resident_memory_bytes

SAMPLE_SECONDS = 0.005
"""Between two looks."""


def release_memory() -> None:
    """Give back what is no longer used, as far as the C library does so at all."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


class MemoryMeter:
    """Looks at this process's resident memory, or at the GPU's memory where there is one."""

    def now(self) -> int:
        """Give the present size.

        Returns:
            Bytes.

        Raises:
            ModelError: The system does not tell.
        """
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            return total - free
        size = resident_memory_bytes()
        if size is None:
            raise ModelError(
                "Cannot measure memory here: this system does not tell a process's own "
                "(/proc/self/statm). Use Linux, or a GPU."
            )
        return size

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
