"""Prepare the next tensors while the last one is being written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = 2
"""That prepare: two cores are everywhere, and each more holds one more tensor in memory."""


def run_ahead(
    prepare: Callable[[Item], Result], items: Iterable[Item], threads: int = THREADS
) -> Iterator[Result]:
    """Give the results in order; the next ones are prepared in threads while the caller uses one.

    Args:
        prepare: Called from several threads at once; begun in the order of the items.
        items: Its arguments.
        threads: How many.

    Yields:
        Each result. At most one more than there are threads are in memory.
    """
    with ThreadPoolExecutor(threads) as pool:
        remaining = iter(items)
        coming: deque[Future[Result]] = deque(
            pool.submit(prepare, item) for item in islice(remaining, threads)
        )
        while coming:
            result = coming.popleft().result()
            coming.extend(pool.submit(prepare, item) for item in islice(remaining, 1))
            yield result
            del result
