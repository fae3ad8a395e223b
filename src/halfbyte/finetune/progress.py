"""How far a training run is, on a terminal or as lines."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from halfbyte.units import format_seconds

LINES = 20
"""Steps that a run prints where it writes no live display."""


class TrainProgress(Protocol):
    """What a run reports, in this order; ``finished`` comes last even after an error."""

    def started(self, plan: tuple[str, ...], steps: int, done: int) -> None:
        """Tell what is about to run, one fact per line; a resumed run has done some steps."""

    def stepped(self, step: int, loss: float) -> None:
        """Tell the loss of a step."""

    def judged(self, step: int, loss: float, best: float) -> None:
        """Tell the loss on the data kept apart, now and at best."""

    def finished(self) -> None:
        """End the display."""


class SilentTrainProgress:
    """Says nothing."""

    def started(self, plan: tuple[str, ...], steps: int, done: int) -> None:
        """Say nothing."""

    def stepped(self, step: int, loss: float) -> None:
        """Say nothing."""

    def judged(self, step: int, loss: float, best: float) -> None:
        """Say nothing."""

    def finished(self) -> None:
        """Say nothing."""


class PlainTrainProgress:
    """Lines, for logs and pipes."""

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

    def judged(self, step: int, loss: float, best: float) -> None:
        """Print one line."""
        self._print(f"step {step}: loss on data kept apart {loss:.4f}, best {best:.4f}")

    def finished(self) -> None:
        """Nothing is left to print."""

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)


class LiveTrainProgress:
    """One line that stays in place: bar, step, losses, time left."""

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
        """Print the plan above the bar, which starts now."""
        for line in plan:
            self._console.print(line, style="dim")
        self._task = self._bar.add_task("", total=steps, completed=done, losses="")
        self._bar.start()

    def stepped(self, step: int, loss: float) -> None:
        """Move the bar."""
        if self._task is not None:
            losses = f"loss {loss:.4f}{self._held_out}"
            self._bar.update(self._task, completed=step, losses=losses)

    def judged(self, step: int, loss: float, best: float) -> None:
        """Show the loss on the data kept apart."""
        self._held_out = f", kept apart {loss:.4f} (best {best:.4f})"

    def finished(self) -> None:
        """Take the bar away."""
        self._bar.stop()


def make_train_progress(console: Console) -> TrainProgress:
    """Pick how progress is shown.

    Args:
        console: Where it goes, stderr as a rule.

    Returns:
        The bar on a terminal, lines elsewhere.
    """
    return LiveTrainProgress(console) if console.is_terminal else PlainTrainProgress(console)
