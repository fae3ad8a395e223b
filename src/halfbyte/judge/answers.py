"""A model's ungraded answers, cached on disk so that an interrupted run loses none.

An :class:`AnswerFile` holds one JSON line per answer, keyed by a digest of the question. Answers of
the same model to the same question are reused: the base's by every later candidate, a candidate's
by a resumed run. Only this module knows the file's format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from halfbyte.errors import CheckpointError
from halfbyte.judge.questions import Question

VERSION = 2
"""Version of the file format; records of other versions are ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A model's answer to one question."""

    choice_nats: tuple[float, ...] = ()
    """Log-likelihood of each choice. Unit: nats."""
    text: str = ""
    """Generated text, up to the first stop sequence."""
    ids: tuple[int, ...] = ()
    """Generated token ids, including the end token; empty for a served model."""
    finite: bool = True
    """Whether all logits were finite."""
    logprobs: tuple[float, ...] = ()
    """Of the generated tokens, without the end token. Unit: nats. Empty for a served model."""
    entropies: tuple[float, ...] = ()
    """Of the predicted distribution at each generated token. Unit: nats."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reverse :meth:`to_dict`."""
        plain: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list | tuple) else v for name, v in values.items()
        }
        return cls(**plain)


class Respondent(Protocol):
    """A model that answers questions, in this process or behind a server."""

    name: str

    @property
    def takes_padding(self) -> bool:
        """Whether prompts of different lengths may run as one batch."""

    def answer_choices(self, questions: list[Question]) -> list[Answer]:
        """Compute the log-likelihoods of the questions' choices, as one batch."""

    def write(
        self, questions: list[Question], *, temperature: float = 0.0, seed: int = 0
    ) -> list[Answer]:
        """Generate a continuation of each prompt, as one batch."""


class AnswerFile:
    """Answers of one model, appended to a file as they arrive."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        """Read the file if it exists.

        Args:
            path: The file.
            fresh: Delete earlier answers.
        """
        self.path = path
        self._values: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        if path.is_file():
            self._read()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> Any:
        """Return a stored value, or None."""
        return self._values.get(key)

    def add(self, values: Mapping[str, Any]) -> None:
        """Append values to the file and sync it to disk.

        Args:
            values: By key.

        Raises:
            CheckpointError: The disk is full or the file is not writable.
        """
        try:
            with self.path.open("a", encoding="utf-8") as handle:
                for key, value in values.items():
                    record = {"v": VERSION, "key": key, "value": value}
                    handle.write(json.dumps(record, separators=(",", ":")) + "\n")
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise CheckpointError(
                f"Cannot write answers to {self.path}: {error.strerror or error}. Free some space "
                "or choose another folder with --cache."
            ) from error
        self._values.update(values)

    def _read(self) -> None:
        raw = self.path.read_bytes()
        whole, _, rest = raw.rpartition(b"\n")
        for line in whole.split(b"\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.get("v") == VERSION:
                self._values[record["key"]] = record["value"]
        if rest:
            # A process was killed in the middle of a line; remove it, so the next starts a new one.
            with self.path.open("r+b") as handle:
                handle.truncate(len(whole) + 1 if whole else 0)
