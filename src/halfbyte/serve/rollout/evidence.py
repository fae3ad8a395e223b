"""Saves evidence as JSON in the background, so that no request waits for the disk."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.atomic import write_atomically
from halfbyte.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)


class EvidenceFile:
    """One JSON file, rewritten atomically each time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="evidence")
        self._newest: Mapping[str, Any] = {}
        self._last: Future[None] | None = None

    def resume(
        self,
        candidate: str,
        settings: Mapping[str, Any],
        restore: Callable[[Mapping[str, Any]], None],
    ) -> None:
        """Resume from the file if it exists; one of another candidate or settings is renamed.

        Args:
            candidate: Must equal the file's value "candidate".
            settings: Must equal the file's value "settings".
            restore: Called with the file's values.

        Raises:
            ConfigError: The file cannot be read, or lacks a value.
        """
        if not self.path.is_file():
            return
        try:
            values = json.loads(self.path.read_bytes())
            if values["candidate"] != candidate or values["settings"] != settings:
                started = values["started"].replace(":", "")
                self.path.replace(self.path.with_name(f"{self.path.stem}-{started}.json"))
                return
            restore(values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"Cannot resume from '{self.path}': {error!r}. Move the file away to start anew."
            ) from error

    def write(self, values: Mapping[str, Any], *, wait: bool = False) -> None:
        """Write the file; errors, such as a full disk, are logged only.

        Args:
            values: JSON-serializable values, which do not change any more.
            wait: Wait until they are written.
        """
        self._newest = values
        # A write that has not begun will write these values; those before them are skipped.
        if self._last is None or self._last.running() or self._last.done():
            self._last = self._writer.submit(self._write)
        if wait:
            self._last.result()

    def _write(self) -> None:
        content = json.dumps(self._newest, indent=2).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, [content])
        except (OSError, CheckpointError) as error:
            log.warning("cannot save evidence: %s", error)
