"""Prepare the next tensors while the last one is being written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKERS = 2
"""Reading waits and compiled code computes without the interpreter: two at a time use two cores."""


def prefetch(prepare: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Give the results in order; the next ones are prepared in threads while the caller uses one.

    Args:
        prepare: Called for :data:`WORKERS` items at once.
        items: Its arguments.

    Yields:
        Each result. At most one more than :data:`WORKERS` are in memory: the caller's and the next.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        following: deque[Future[Result]] = deque()
        for item in items:
            following.append(pool.submit(prepare, item))
            if len(following) > WORKERS:
                # In one expression: no name here keeps a result alive while others are made.
                yield following.popleft().result()
        while following:
            yield following.popleft().result()
