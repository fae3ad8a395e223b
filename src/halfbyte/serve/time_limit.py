"""One timer for many waits: to set and unset one for every token costs more than the token does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Result = TypeVar("Result")


class TimeLimit:
    """Lets each of many waits, one after the other, last no longer than it may.

    As :func:`asyncio.timeout_at`, but the timer stays set from one wait to the next. When it goes
    off it looks at the wait of that moment, and is set again where that one has time left.
    """

    def __init__(self) -> None:
        """Start without a timer."""
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        self._late = float("inf")
        self.is_over = False
        """Whether the last wait took too long, rather than that what it waited for raised."""

    async def wait(self, work: Awaitable[Result], late: float | None) -> Result:
        """Wait for something.

        Args:
            work: What is waited for; cancelled where it takes too long.
            late: From when on it is too late, by the event loop's clock; None: never.

        Returns:
            Its result.

        Raises:
            TimeoutError: It took too long.
            CancelledError: Somebody else has cancelled the task.
        """
        if late is None:
            return await work
        task = asyncio.current_task()
        assert task is not None
        cancelled_before = task.cancelling()
        self._task, self._late, self.is_over = task, late, False
        self._set(late)
        try:
            return await work
        except asyncio.CancelledError as error:
            # Somebody else may have cancelled the task as well: that goes on.
            if self.is_over and task.cancelling() == cancelled_before + 1:
                raise TimeoutError from error
            raise
        finally:
            self._task = None
            if self.is_over:
                task.uncancel()

    def close(self) -> None:
        """Take the timer down; a later wait sets it again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self, late: float) -> None:
        if self._timer is not None:
            if self._timer.when() <= late:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(late, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._task is None:
            return
        if asyncio.get_running_loop().time() < self._late:
            self._set(self._late)
            return
        self.is_over = True
        self._task.cancel()
