"""What fallback has cost, on disk: a restart does not begin with a full budget."""

from __future__ import annotations

import json
import time
from pathlib import Path

from halfbyte.errors import ConfigError
from halfbyte.serve.rollout.evidence import EvidenceFile
from halfbyte.serve.routing.budget import FallbackBudget
from halfbyte.serve.watch.observation import Observation

FILE = "budget.json"


class SpendingFile:
    """Keeps one budget."""

    def __init__(self, folder: Path, budget: FallbackBudget) -> None:
        """Go on from the file, if there is one.

        Args:
            folder: Of it.
            budget: Nothing is spent of it yet.

        Raises:
            ConfigError: The file is none of these.
        """
        path = folder / FILE
        self._file = EvidenceFile(path)
        self._budget = budget
        if not path.exists():
            return
        try:
            budget.restore(json.loads(path.read_bytes()), time.time())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"Cannot go on from what was spent by '{path}': {error!r}. Move the file away to "
                "begin with a full budget."
            ) from error

    def observe(self, seen: Observation) -> None:
        """Write down what a request has cost, where it cost anything."""
        if any(attempt.role == "fallback" for attempt in seen.attempts):
            self._file.write(self._budget.state(time.time()))

    def close(self) -> None:
        """Write the last of it."""
        self._file.write(self._budget.state(time.time()), wait=True)
