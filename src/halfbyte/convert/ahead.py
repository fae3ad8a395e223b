"""Prepare the next tensor while the last one is being written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_ahead(prepare: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Give the results in order; the next is prepared in a thread while the caller uses one.

    Args:
        prepare: Called for one item after another, never for two at once.
        items: Its arguments.

    Yields:
        Each result. At most two are in memory: the caller's and the next.
    """
    with ThreadPoolExecutor(1) as pool:
        remaining = iter(items)
        first = next(remaining, None)
        if first is None:
            return
        following = pool.submit(prepare, first)
        for item in remaining:
            result = following.result()
            following = pool.submit(prepare, item)
            yield result
            del result
        yield following.result()
