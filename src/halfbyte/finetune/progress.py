"""Progress display of a training run: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from halfbyte.units import format_seconds

LINES = 20
"""Number of steps that are printed as lines, without a live display."""


class TrainProgress(Protocol):
    """Callbacks of a run, in this order; ``finished`` is called last even after an error."""

    def started(self, plan: tuple[str, ...], steps: int, done: int) -> None:
        """Show the plan, one fact per line; a resumed run has ``done`` some steps already."""

    def stepped(self, step: int, loss: float) -> None:
        """Show the training loss of a step."""

    def evaluated(self, step: int, loss: float, best: float) -> None:
        """Show the held-out loss of a step, and the best so far."""

    def finished(self) -> None:
        """End the display."""


class SilentTrainProgress:
    """Shows nothing."""

    def started(self, plan: tuple[str, ...], steps: int, done: int) -> None:
        """Do nothing."""

    def stepped(self, step: int, loss: float) -> None:
        """Do nothing."""

    def evaluated(self, step: int, loss: float, best: float) -> None:
        """Do nothing."""

    def finished(self) -> None:
        """Do nothing."""


class PlainTrainProgress:
    """Prints lines, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._steps = self._done = 0
        self._start = time.monotonic()

    def started(self, plan: tuple[str, ...], steps: int, done: int) -> None:
        """Print the plan."""
        self._steps, self._done, self._start = steps, done, time.monotonic()
        for line in plan:
            self._print(line)

    def stepped(self, step: int, loss: float) -> None:
        """Print some of the steps."""
        if step % max(self._steps // LINES, 1):
            return
        pace = (time.monotonic() - self._start) / max(step - self._done, 1)
        left = format_seconds(pace * (self._steps - step))
        self._print(f"step {step} of {self._steps}: loss {loss:.4f}, {left} left")

    def evaluated(self, step: int, loss: float, best: float) -> None:
        """Print one line."""
        self._print(f"step {step}: held-out loss {loss:.4f}, best {best:.4f}")

    def finished(self) -> None:
        """Do nothing."""

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)


class LiveTrainProgress:
    """A live progress bar with step, losses and remaining time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            BarColumn(bar_width=30),
            TextColumn("step {task.completed} of {task.total}"),
            TextColumn("{task.fields[losses]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._held_out = ""

    def started(self, plan: tuple[str, ...], steps: int, done: int) -> None:
        """Print the plan and start the bar."""
        for line in plan:
            self._console.print(line, style="dim")
        self._task = self._bar.add_task("", total=steps, completed=done, losses="")
        self._bar.start()

    def stepped(self, step: int, loss: float) -> None:
        """Move the bar."""
        if self._task is not None:
            losses = f"loss {loss:.4f}{self._held_out}"
            self._bar.update(self._task, completed=step, losses=losses)

    def evaluated(self, step: int, loss: float, best: float) -> None:
        """Show the held-out loss next to the training loss."""
        self._held_out = f", held-out {loss:.4f} (best {best:.4f})"

    def finished(self) -> None:
        """Remove the bar."""
        self._bar.stop()


def make_train_progress(console: Console) -> TrainProgress:
    """Make the progress display for a console.

    Args:
        console: Usually stderr.

    Returns:
        A bar on a terminal, lines elsewhere.
    """
    return LiveTrainProgress(console) if console.is_terminal else PlainTrainProgress(console)
