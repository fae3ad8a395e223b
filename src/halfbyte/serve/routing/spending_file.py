"""Saves what fallback has spent, so that a restart does not begin with a full budget."""

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
    """The file of one budget."""

    def __init__(self, folder: Path, budget: FallbackBudget) -> None:
        """Restore the budget from the file if it exists.

        Args:
            folder: Where the file is.
            budget: A budget from which nothing has been spent.

        Raises:
            ConfigError: The file cannot be read.
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
                f"Cannot restore the fallback budget from '{path}': {error!r}. Move the file away "
                "to start with a full budget."
            ) from error

    def observe(self, observation: Observation) -> None:
        """Save the budget after a request that used a fallback model."""
        if any(attempt.role == "fallback" for attempt in observation.attempts):
            self._file.write(self._budget.state(time.time()))

    def close(self) -> None:
        """Save the budget, and wait until it is written."""
        self._file.write(self._budget.state(time.time()), wait=True)
