"""Write finished blocks in order, in a background thread if the computation runs on a GPU.

Each block's shard is written before its journal entry, and the entries are in block order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

from halfbyte.quantize.journal import Journal

Result = TypeVar("Result")


class BlockWriter:
    """Writes the shards and journal entries of blocks."""

    def __init__(self, journal: Journal, *, in_background: bool) -> None:
        """Start the background threads, if any.

        Args:
            journal: Gets an entry for every block.
            in_background: Whether to write while the next block is computed.
        """
        self._journal = journal
        self._pool = ThreadPoolExecutor(2) if in_background else None
        self._running: Future[None] | None = None

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for running writes; their errors are raised by :meth:`wait` only."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def submit(self, write: Callable[[], Mapping[str, Any]]) -> None:
        """Write a block after the one before it.

        Args:
            write: Writes the shard and returns the journal entry.
        """
        self.wait()
        if self._pool is None:
            self._write(write)
        else:
            self._running = self._pool.submit(self._write, write)

    def start(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Start work that no block depends on; without a background it runs when called.

        Args:
            work: Writes something other than a block.

        Returns:
            Returns the result of the work, or raises its error.
        """
        return work if self._pool is None else self._pool.submit(work).result

    def wait(self) -> None:
        """Wait until the submitted block is written, and raise its error if there was one."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _write(self, write: Callable[[], Mapping[str, Any]]) -> None:
        self._journal.add_block(write())
