"""What is done, so that a killed run goes on where it stopped and gives the same bytes.

The output folder holds a work folder until the run is complete. In it stands the journal: a header
that says which inputs and options it belongs to, then one line per finished block. A line is
written, and brought to the disk, after everything that it speaks of; a torn last line is as if it
had never been written. So are blocks behind the last one whose hidden states were saved.
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
"""Begins the names of files that a new run in the same folder may use again."""
REPLACES = "replaces"
"""Key of a line that takes the place of an earlier block's."""


SETTINGS = "settings"
"""Key of the header, and of a line that replaces it: from there on the run decided otherwise."""


STATES = "states"
"""Key of a block's line that tells the hidden states behind it; None: they were not saved."""


class Journal:
    """The journal of one output folder, held by one process at a time."""

    def __init__(self, output: Path) -> None:
        """Name the folders; nothing is touched.

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
        """Make the work folder and lock it against other processes.

        Returns:
            The journal.

        Raises:
            JournalError: Another process works on this output.
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
        """Whether an unfinished run stands here."""
        return self.path.is_file()

    def load(self) -> None:
        """Read header and finished blocks; a torn last line is cut off.

        Raises:
            JournalError: The journal is damaged in its middle.
        """
        lines = self.path.read_bytes().split(b"\n")
        entries: list[dict[str, Any]] = []
        read_bytes = sound_bytes = sound = 0
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
            # Without its line end, an entry may be cut short and still be JSON.
            if number == len(lines) - 1:
                break
            entries.append(entry)
            read_bytes += len(line) + 1
            if entry.get(STATES, True) is not None:
                sound, sound_bytes = len(entries), read_bytes
        del entries[sound:]
        with self.path.open("r+b") as file:
            file.truncate(sound_bytes)
        self.header = entries[0] if entries else {}
        self.blocks = []
        for entry in entries[1:]:
            self._take(entry)

    def start(self, header: Mapping[str, Any]) -> None:
        """Begin a new journal; what an earlier run left in the work folder is removed."""
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
        """Record that a finished block was written again."""
        line = {**entry, REPLACES: index}
        self._take(dict(line))
        self._append(line)

    def change_settings(self, settings: Mapping[str, Any]) -> None:
        """Record that the run goes on with other settings, behind its last saved block.

        Args:
            settings: In the form of the header's.
        """
        self.load()  # cuts off what the saved states do not follow
        line = {SETTINGS: dict(settings)}
        self._take(dict(line))
        self._append(line)

    def check_same(self, inputs: Mapping[str, Any]) -> None:
        """Refuse to go on with other inputs or options.

        Args:
            inputs: What this run was given, in the form of the header's ``inputs``.

        Raises:
            JournalError: Something differs; names each difference with both values.
        """
        differences = describe_differences(self.header.get("inputs", {}), inputs)
        if differences:
            raise JournalError(
                f"The unfinished run in {self.output} was started with other inputs or options "
                f"({differences}). Give the same ones to go on, or choose another output folder."
            )

    def remove(self) -> None:
        """Remove the work folder: the checkpoint is complete."""
        # The journal first: a kill in the middle then leaves a folder without an unfinished run.
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _take(self, entry: dict[str, Any]) -> None:
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
    """Name the settings that differ, with both values.

    Args:
        then: As read from JSON.
        now: Plain values.

    Returns:
        One clause per setting, five at most; "" where all are the same.
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
