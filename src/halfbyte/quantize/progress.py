"""Progress displays of a run.

The pipeline calls a :class:`Progress`; :func:`make_progress` picks the live display on a terminal
and plain lines elsewhere. :class:`SilentProgress` shows nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from halfbyte.machine.memory import resident_memory_bytes
from halfbyte.quantize.report import ModuleReport
from halfbyte.units import format_bytes, format_error, format_seconds


class Progress(Protocol):
    """Callbacks of the pipeline; ``finished`` is always called last, even after an error."""

    def started(self, plan: tuple[str, ...]) -> None:
        """Show the plan (memory, disk, time), one fact per line."""

    def phase(self, name: str) -> None:
        """Show what is being done, such as "reading the calibration text"."""

    def block_started(self, index: int, count: int) -> None:
        """Show that block ``index`` (from 0) of ``count`` starts; a resumed run skips the first."""

    def module_done(self, module: ModuleReport) -> None:
        """Show that one linear has been quantized."""

    def tuned(self, step: int, steps: int, kl: float, best: float) -> None:
        """Show the step of end-to-end training, and the current and best held-out KL in nats."""

    def finished(self) -> None:
        """End the display."""


class _NoteFilter:
    """Selects notes that are new for their kind of module, to avoid repeating them per block."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()

    def new_lines(self, module: ModuleReport) -> list[str]:
        new = [note for note in module.notes if (module.kind, note) not in self._seen]
        self._seen.update((module.kind, note) for note in new)
        return [f"{module.name}: {note}" for note in new]


class SilentProgress:
    """Shows nothing."""

    def started(self, plan: tuple[str, ...]) -> None:
        """Show nothing."""

    def phase(self, name: str) -> None:
        """Show nothing."""

    def block_started(self, index: int, count: int) -> None:
        """Show nothing."""

    def module_done(self, module: ModuleReport) -> None:
        """Show nothing."""

    def tuned(self, step: int, steps: int, kl: float, best: float) -> None:
        """Show nothing."""

    def finished(self) -> None:
        """Show nothing."""


@dataclass(slots=True)
class _Position:
    """State of the run that both displays show."""

    start: float = field(default_factory=lambda: time.monotonic())
    phase: str = "starting"
    block: int | None = None
    block_start: float = 0.0
    num_blocks: int = 0
    first_block: int | None = None
    first_block_start: float = 0.0
    module: ModuleReport | None = None
    tuning: tuple[int, int, float, float] | None = None
    """Step, steps, held-out KL now and at best."""

    def enter_block(self, index: int, count: int) -> None:
        self.block, self.block_start, self.num_blocks = index, time.monotonic(), count
        if self.first_block is None:
            self.first_block, self.first_block_start = index, self.block_start

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def seconds_left(self, *, block_done: bool = False) -> float | None:
        """Estimate the time for the remaining blocks, from the pace of those done in this process.

        The current block counts as remaining unless it is done.
        """
        if self.block is None or self.first_block is None or self.tuning is not None:
            return None
        now = time.monotonic()
        next_block, its_start = (
            (self.block + 1, now) if block_done else (self.block, self.block_start)
        )
        done = next_block - self.first_block
        if not done:
            return None
        pace = (its_start - self.first_block_start) / done
        return max(pace * (self.num_blocks - next_block) - (now - its_start), 0.0)


class PlainProgress:
    """One line per block and phase, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._position = _Position()
        self._notes = _NoteFilter()
        self._modules: list[ModuleReport] = []
        self._start = 0.0
        """Of the block or phase whose modules these are."""

    def started(self, plan: tuple[str, ...]) -> None:
        """Print the plan."""
        for line in plan:
            self._print(line)

    def phase(self, name: str) -> None:
        """Print the phase, after the line of the last block."""
        self._end_block()
        self._start = time.monotonic()
        self._print(f"{name} ({format_seconds(self._position.elapsed)})")

    def block_started(self, index: int, count: int) -> None:
        """Print the line of the block before."""
        self._end_block()
        self._position.enter_block(index, count)
        self._start = self._position.block_start

    def module_done(self, module: ModuleReport) -> None:
        """Record the module for its block's line; print a new note immediately."""
        self._modules.append(module)
        for line in self._notes.new_lines(module):
            self._print(line)

    def tuned(self, step: int, steps: int, kl: float, best: float) -> None:
        """Print one line."""
        elapsed = format_seconds(self._position.elapsed)
        self._print(f"step {step} of {steps}: held-out KL {kl:.4f}, best {best:.4f} ({elapsed})")

    def finished(self) -> None:
        """Print the line of the last block."""
        self._end_block()

    def _end_block(self) -> None:
        if not self._modules:
            return
        position = self._position
        worst = max(self._modules, key=lambda module: module.relative_error or 0.0)
        is_head = worst.block is None
        where = "head" if is_head else f"block {(position.block or 0) + 1} of {position.num_blocks}"
        parts = [
            f"{where}: {len(self._modules)} modules",
            f"worst {worst.kind} {format_error(worst.relative_error)}",
            format_seconds(time.monotonic() - self._start),
            format_bytes(resident_memory_bytes()),
        ]
        left = position.seconds_left(block_done=True)
        if left:
            parts.append(f"{format_seconds(left)} left")
        self._print(", ".join(parts))
        self._modules = []

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)


class LiveProgress:
    """A live display: progress bar, block, module, error, elapsed and remaining time, memory."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._position = _Position()
        self._notes = _NoteFilter()
        self._live = Live(
            console=console, get_renderable=self.render, refresh_per_second=4, transient=True
        )

    def started(self, plan: tuple[str, ...]) -> None:
        """Print the plan and start the display below it."""
        for line in plan:
            self._console.print(line, style="dim")
        self._live.start(refresh=True)

    def phase(self, name: str) -> None:
        """Show the phase, in place of training steps; also before the plan is known."""
        self._position.phase, self._position.tuning = name, None
        self._live.start(refresh=True)

    def block_started(self, index: int, count: int) -> None:
        """Move the bar."""
        self._position.enter_block(index, count)

    def module_done(self, module: ModuleReport) -> None:
        """Show the module; print a new note permanently above the display."""
        self._position.module = module
        for line in self._notes.new_lines(module):
            self._console.print(line, style="yellow")

    def tuned(self, step: int, steps: int, kl: float, best: float) -> None:
        """Show the training step on the bar, and the KL."""
        self._position.tuning = (step, steps, kl, best)

    def finished(self) -> None:
        """Remove the display."""
        self._live.stop()

    def render(self) -> Table:
        """Render the display; rich calls this four times a second."""
        position = self._position
        grid = Table.grid(padding=(0, 2))
        done = position.block or 0
        where = "" if position.block is None else f"block {done + 1} of {position.num_blocks}"
        facts = [f"{format_seconds(position.elapsed)} elapsed"]
        left = position.seconds_left()
        if left:
            facts.append(f"{format_seconds(left)} left")
        facts.append(format_bytes(resident_memory_bytes()))
        total = position.num_blocks
        if position.tuning is not None:
            done, total, kl, best = position.tuning
            where = f"step {done} of {total}"
        bar = ProgressBar(total=max(total, 1), completed=done, width=30)
        grid.add_row(bar, Text(where), Text(", ".join(facts)))
        module = position.module
        if position.tuning is not None:
            held_out = f"held-out KL {kl:.4f}, best {best:.4f}"
            grid.add_row(Text(position.phase), Text(held_out), Text("Ctrl-C keeps the best"))
        elif module is not None:
            loss = f"relative error {format_error(module.relative_error)}"
            grid.add_row(Text(position.phase), Text(module.kind), Text(loss))
        else:
            grid.add_row(Text(position.phase))
        return grid


def make_progress(console: Console) -> Progress:
    """Select the progress display for a console.

    Args:
        console: The console, usually stderr.

    Returns:
        The live display on a terminal, plain lines elsewhere.
    """
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)
