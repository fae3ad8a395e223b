"""The journal of finished blocks, so that a killed run can resume and produce the same bytes.

The output folder holds a work folder until the run is complete. It contains the journal: a header
with the inputs and options of the run, then one line per finished block. A line is written and
synced to disk after everything that it refers to. When the journal is read, an incomplete last line
is ignored, and so are blocks after the last one whose hidden states were saved.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from halfbyte.errors import JournalError

WORK_FOLDER = ".halfbyte"
JOURNAL_FILE = "journal.jsonl"
LOCK_FILE = "lock"
KEPT_PREFIX = "input-"
"""Prefix of files in the work folder that a new run may reuse."""
REPLACES = "replaces"
"""Key of a line that replaces an earlier block's entry; its value is the block's index."""
SETTINGS = "settings"
"""Key of the run's settings in the header, and of a line that replaces them."""
STATES = "states"
"""Key of the hidden states behind a block in its line; None: they were not saved."""


class Journal:
    """The journal of one output folder, locked by one process at a time."""

    def __init__(self, output: Path) -> None:
        """Set the paths; nothing is read or written yet.

        Args:
            output: The checkpoint's folder.
        """
        self.output = output
        self.folder = output / WORK_FOLDER
        self.path = self.folder / JOURNAL_FILE
        self.header: dict[str, Any] = {}
        self.blocks: list[dict[str, Any]] = []
        self._lock: Any = None

    def __enter__(self) -> Self:
        """Create the work folder and lock it.

        Returns:
            The journal.

        Raises:
            JournalError: Another process holds the lock.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / LOCK_FILE).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise JournalError(
                f"Another process is writing into {self.output}. Wait for it, or choose another "
                "output folder."
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        """Unlock."""
        self._lock.close()

    @property
    def exists(self) -> bool:
        """Whether there is an unfinished run."""
        return self.path.is_file()

    def load(self) -> None:
        """Read header and finished blocks, and truncate the file after the last resumable one.

        Raises:
            JournalError: A line other than the last is damaged.
        """
        lines = self.path.read_bytes().split(b"\n")
        entries: list[dict[str, Any]] = []
        read_bytes = valid_bytes = num_valid = 0
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
            except ValueError as error:
                if number >= len(lines) - 2:
                    break
                raise JournalError(
                    f"The journal {self.path} is damaged in line {number + 1}. Remove "
                    f"{self.folder} and start again without --resume."
                ) from error
            # Without its newline, an entry may be incomplete although it is valid JSON.
            if number == len(lines) - 1:
                break
            entries.append(entry)
            read_bytes += len(line) + 1
            if entry.get(STATES, True) is not None:
                num_valid, valid_bytes = len(entries), read_bytes
        del entries[num_valid:]
        with self.path.open("r+b") as file:
            file.truncate(valid_bytes)
        self.header = entries[0] if entries else {}
        self.blocks = []
        for entry in entries[1:]:
            self._apply(entry)

    def start(self, header: Mapping[str, Any]) -> None:
        """Start a new journal and remove the files of an earlier run, except reusable inputs."""
        for path in self.folder.iterdir():
            if path.name != LOCK_FILE and not path.name.startswith(KEPT_PREFIX):
                path.unlink()
        self.header, self.blocks = dict(header), []
        self._append(self.header)

    def add_block(self, entry: Mapping[str, Any]) -> None:
        """Record a finished block."""
        self.blocks.append(dict(entry))
        self._append(entry)

    def replace_block(self, index: int, entry: Mapping[str, Any]) -> None:
        """Record that a finished block was rewritten."""
        line = {**entry, REPLACES: index}
        self._apply(dict(line))
        self._append(line)

    def change_settings(self, settings: Mapping[str, Any]) -> None:
        """Record that the run continues after its last saved block with other settings.

        Args:
            settings: The settings, in the form of the header's.
        """
        self.load()  # drops blocks without saved hidden states
        line = {SETTINGS: dict(settings)}
        self._apply(dict(line))
        self._append(line)

    def check_same(self, inputs: Mapping[str, Any]) -> None:
        """Check that a run is resumed with the same inputs and options.

        Args:
            inputs: Inputs of this run, in the form of the header's ``inputs``.

        Raises:
            JournalError: Something differs; names each difference with both values.
        """
        differences = describe_differences(self.header.get("inputs", {}), inputs)
        if differences:
            raise JournalError(
                f"The unfinished run in {self.output} was started with other inputs or options "
                f"({differences}). Use the same ones to resume it, or choose another output folder."
            )

    def remove(self) -> None:
        """Remove the work folder, once the checkpoint is complete."""
        # The journal first: if the process is killed in between, no unfinished run remains.
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _apply(self, entry: dict[str, Any]) -> None:
        """Update header or blocks with a journal line."""
        if SETTINGS in entry:
            self.header |= entry
            return
        index = entry.pop(REPLACES, None)
        if index is None:
            self.blocks.append(entry)
        else:
            self.blocks[index] = entry

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def describe_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describe the settings that differ, with both values.

    Args:
        then: Values as read from JSON.
        now: Plain values, not yet through JSON.

    Returns:
        One clause per setting, five at most; "" if all are the same.
    """
    before, after = _flatten(then), _flatten(json.loads(json.dumps(now)))
    names = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    return "; ".join(
        f"{n}: {_short(before.get(n))} then, {_short(after.get(n))} now" for n in names[:5]
    )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
