"""Writes finished blocks, one after another; beside the computation where that leaves the CPU free.

Each block's shard comes before its line in the journal, and the lines come in the order of the
blocks, whoever writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

from halfbyte.quantize.journal import Journal

Result = TypeVar("Result")


class BlockWriter:
    """Takes over what is to be written of a block."""

    def __init__(self, journal: Journal, *, beside: bool) -> None:
        """Get ready.

        Args:
            journal: Gets a line for every block.
            beside: Whether to write while the next block is computed.
        """
        self._journal = journal
        self._pool = ThreadPoolExecutor(2) if beside else None
        self._running: Future[None] | None = None

    def __enter__(self) -> Self:
        """Do nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let what was begun end; an error in it is told by :meth:`wait` only."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def submit(self, write: Callable[[], Mapping[str, Any]]) -> None:
        """Write a block as soon as the one before it is written.

        Args:
            write: Writes the shard and gives the journal's entry.
        """
        self.wait()
        if self._pool is None:
            self._write(write)
        else:
            self._running = self._pool.submit(self._write, write)

    def begin(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Do what no block depends on: at once beside them, or when the result is asked for.

        Args:
            work: Writes something else.

        Returns:
            Gives the result, or raises what went wrong.
        """
        return work if self._pool is None else self._pool.submit(work).result

    def wait(self) -> None:
        """Wait until all that was submitted is written; what went wrong there is raised here."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _write(self, write: Callable[[], Mapping[str, Any]]) -> None:
        self._journal.add_block(write())
