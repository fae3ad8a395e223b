"""Saves evidence as JSON in the background, so that no request waits for the disk."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.atomic import write_atomically
from halfbyte.errors import CheckpointError

log = logging.getLogger(__name__)


class EvidenceFile:
    """One JSON file, rewritten atomically each time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="evidence")
        self._newest: Mapping[str, Any] = {}
        self._last: Future[None] | None = None

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
