"""Prepare the next tensors in threads while the current one is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKERS = 2
"""Number of threads. Reading and compiled code release the GIL, so that two use two cores."""


def prefetch(prepare: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Map a function over items in threads, ahead of the consumer; yields results in order.

    Args:
        prepare: The function, called for up to :data:`WORKERS` items at once.
        items: Its arguments.

    Yields:
        Each result. At most :data:`WORKERS` + 1 are in memory: the caller's and the next ones.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(prepare, item))
            if len(pending) > WORKERS:
                # In one expression, so that no variable keeps the result alive.
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
