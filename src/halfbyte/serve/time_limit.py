"""A timeout that reuses one timer for many waits: one timer per token would be too slow."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Result = TypeVar("Result")


class TimeLimit:
    """Applies a deadline to each of many successive waits.

    Like :func:`asyncio.timeout_at`, but the timer stays set between waits. When it fires, it checks
    the current wait's deadline, and is rescheduled if that has not passed.
    """

    def __init__(self) -> None:
        """Start without a timer."""
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        self._deadline = float("inf")
        self.has_expired = False
        """Whether the last wait timed out; False if the awaited work itself raised."""

    async def wait(self, work: Awaitable[Result], deadline: float | None) -> Result:
        """Await something until a deadline.

        Args:
            work: The awaitable; cancelled at the deadline.
            deadline: Time of the event loop's clock; None for no deadline.

        Returns:
            The awaitable's result.

        Raises:
            TimeoutError: The deadline passed.
            CancelledError: The task was cancelled by someone else.
        """
        if deadline is None:
            return await work
        task = asyncio.current_task()
        assert task is not None
        cancelled_before = task.cancelling()
        self._task, self._deadline, self.has_expired = task, deadline, False
        self._schedule(deadline)
        try:
            return await work
        except asyncio.CancelledError as error:
            # If someone else cancelled the task too, that cancellation must propagate.
            if self.has_expired and task.cancelling() == cancelled_before + 1:
                raise TimeoutError from error
            raise
        finally:
            self._task = None
            if self.has_expired:
                task.uncancel()

    def close(self) -> None:
        """Cancel the timer; a later wait sets it again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _schedule(self, deadline: float) -> None:
        if self._timer is not None:
            if self._timer.when() <= deadline:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(deadline, self._check_deadline)

    def _check_deadline(self) -> None:
        self._timer = None
        if self._task is None:
            return
        if asyncio.get_running_loop().time() < self._deadline:
            self._schedule(self._deadline)
            return
        self.has_expired = True
        self._task.cancel()
