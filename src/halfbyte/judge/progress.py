"""How comparisons and measurements show progress without a terminal: lines for logs and pipes."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console

from halfbyte.units import format_seconds

Progress = Callable[[str, int, int], None]
"""Called with the stage and with (done, total) within it."""

StepProgress = Callable[[int, int], None]
"""Called with (done, total)."""

INTERVAL_SECONDS = 30.0
"""Shortest time between two lines of the same stage."""


class PlainProgress:
    """Prints a line when a stage starts, and at most every 30 seconds within it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start = time.monotonic()
        self._stage = ""
        self._stage_start = self._last_line = self._start
        self._done_at_start = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Print a line, unless the stage printed one less than 30 seconds ago.

        Args:
            stage: Its name, such as "base: tasks"; a new name starts a new stage.
            done: Steps done, including those of an earlier run.
            total: Steps of the stage; 1 for a stage without steps.
        """
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._stage_start, self._done_at_start = stage, now, done
        elif now - self._last_line < INTERVAL_SECONDS:
            return
        self._last_line = now
        steps = f", {done} of {total}" if total > 1 else ""
        times = [f"{format_seconds(now - self._start)} elapsed"]
        if self._done_at_start < done < total:
            pace = (now - self._stage_start) / (done - self._done_at_start)
            times.append(f"{format_seconds(pace * (total - done))} left in this stage")
        self._console.print(f"{stage}{steps} ({', '.join(times)})", soft_wrap=True)
