"""What a model answered, apart from whether it is right; kept on disk, so that no run is lost.

An :class:`AnswerFile` is one JSON line per answer, under the digest of the question. Answers of the
same model to the same question are used again: those of the base by every later candidate, those of
a candidate by a resumed run. Nothing but this file knows how they are kept.
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
"""Of the answers' form; another one is not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A model's answer to one question."""

    choice_nats: tuple[float, ...] = ()
    """Log-likelihood of each choice. Unit: nats."""
    text: str = ""
    """What it wrote, up to the first stop text."""
    ids: tuple[int, ...] = ()
    """The same as token ids, the end token included; empty for a served model."""
    finite: bool = True
    """Whether all its logits were numbers."""
    logprobs: tuple[float, ...] = ()
    """Of the written tokens, the end token left out. Unit: nats. Empty for a served model."""
    entropies: tuple[float, ...] = ()
    """Of the distributions that they were drawn from. Unit: nats."""

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Undo :meth:`to_dict`."""
        plain: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list | tuple) else v for name, v in values.items()
        }
        return cls(**plain)


class Respondent(Protocol):
    """A model that answers questions: in this process, or served elsewhere."""

    name: str

    @property
    def takes_padding(self) -> bool:
        """Whether prompts of unlike length may run as one batch."""

    def answer_choices(self, questions: list[Question]) -> list[Answer]:
        """Rate the choices of these questions, as one batch."""

    def write(
        self, questions: list[Question], *, temperature: float = 0.0, seed: int = 0
    ) -> list[Answer]:
        """Write on after each of these prompts, as one batch."""


class AnswerFile:
    """Answers of one model, on disk as they come."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        """Read what is there.

        Args:
            path: The file; it need not exist.
            fresh: Forget what is there.
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
        """Give a kept value, or None."""
        return self._values.get(key)

    def keep(self, values: Mapping[str, Any]) -> None:
        """Write values down; after this a killed process loses none of them.

        Args:
            values: By what was asked.

        Raises:
            CheckpointError: The disk is full or the file cannot be written to.
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
                f"Cannot keep answers in {self.path}: {error.strerror or error}. Free some space "
                "or name another folder (--cache)."
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
            # A process was killed while it wrote: what follows must begin on a line of its own.
            with self.path.open("r+b") as handle:
                handle.truncate(len(whole) + 1 if whole else 0)
