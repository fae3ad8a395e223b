"""A log of requests and answers in SQLite, redacted, written by a background thread.

If the disk is full, or writing fails for another reason, rows are dropped and counted; requests are
not affected, and logging continues when writing works again. Only the newest rows are kept.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import sqlite3
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from halfbyte.errors import ConfigError
from halfbyte.serve.watch.observation import Observation

log = logging.getLogger(__name__)

MAX_QUEUE = 1000
"""Rows waiting to be written; more are dropped."""
MAX_BATCH = 200
"""Rows written in one transaction."""
TRIM_EVERY = 1000
"""Rows after which the oldest ones are deleted."""
MAX_TEXT_CHARACTERS = 100_000
"""Characters stored of one request or answer. Only these are redacted: a pattern holds the GIL for
as long as it runs, which would be seconds for the longest text that a client may send."""
MAX_SECRET_CHARACTERS = 4096
ITEM_CHARACTERS = 4
"""Counted per item of a list or object, besides its text."""
CLOSE_SECONDS = 10.0
"""Time for writing the queued rows when the log is closed."""

TABLE = """
create table if not exists requests (
    time text not null, id text not null, key text not null, kind text not null,
    model text not null, backend text not null, version text not null, reason text not null,
    status integer not null, error text not null, seconds real, first_token_seconds real,
    prompt_tokens integer, completion_tokens integer, checks text not null, attempts text not null,
    request text, answer text
)
"""
COLUMNS = 18
ERROR_COLUMN = 9

_AFTER_ESCAPE = r"(?<=\\[nrt])"
"""Start of a line in JSON within a text, such as a tool call's arguments."""
_START = rf"(?:\b|{_AFTER_ESCAPE})"

REDACTIONS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("email", re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63})+")),
    ("secret", re.compile(_START + r"(?:sk|pk|ghp|gho|xox[abp]|hf|AKIA)[-_]?[A-Za-z0-9_-]{16,}")),
    ("secret", re.compile(_START + r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}")),
    ("secret", re.compile(r"(?i)(?<=bearer )[A-Za-z0-9._~+/-]{8,}=*")),
    ("secret", re.compile(r"(?i)(?<=password[:=])\s?\S{4,}")),
    ("iban", re.compile(_START + r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b")),
    ("card", re.compile(_START + r"\d(?:[ -]?\d){12,18}\b")),
    ("phone", re.compile(r"(?:\+\d{1,3}|\(\d{2,5}\))(?:[ /.-]?\(?\d{2,8}\)?){1,5}(?![\w.])")),
    (
        "phone",
        re.compile(
            rf"(?:(?<![\w.+-])|{_AFTER_ESCAPE})" + r"\d{3,5}[ /-]\d{3,4}[ -]\d{3,5}(?![\w.-])"
        ),
    ),
    ("address", re.compile(_START + r"(?:\d{1,3}\.){3}\d{1,3}\b")),
)
"""Patterns replaced by ``[name]``. A safety net only: it recognizes formats, not, say, names."""

Row = tuple[Any, ...]


def redact(text: str) -> str:
    """Replace what looks like personal data or a secret.

    Args:
        text: Any text.

    Returns:
        The text with ``[email]``, ``[secret]``, ``[iban]``, ``[card]``, ``[phone]`` and
        ``[address]`` instead.
    """
    for name, pattern in REDACTIONS:
        text = pattern.sub(f"[{name}]", text)
    return text


class RequestLog:
    """The log and its writer thread."""

    def __init__(
        self,
        path: Path,
        *,
        texts: bool = True,
        rows: int = 1_000_000,
        dropped: Callable[[int], None] | None = None,
        max_pages: int | None = None,
    ) -> None:
        """Open the log.

        Args:
            path: The SQLite file; if it is missing it is created, readable by its owner only.
            texts: Store the redacted texts; else numbers only.
            rows: Number of rows kept, the newest.
            dropped: Called with the number of dropped rows.
            max_pages: Maximum size of the file in pages of 4096 bytes; None: no limit.

        Raises:
            ConfigError: The file cannot be written.
        """
        self._path = path
        self._texts = texts
        self._rows = rows
        self._dropped = dropped or (lambda count: None)
        self._max_pages = max_pages
        self._queue: queue.Queue[Row | None] = queue.Queue(MAX_QUEUE)
        self._since_trim = 0
        self._has_reported = False
        """Whether the current failure to write has been logged."""
        try:
            self._connect().close()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"Cannot write the request log '{path}': {error}. Choose another file with "
                "--request-log."
            ) from error
        self._thread = threading.Thread(target=self._write_all, name="request-log", daemon=True)
        self._thread.start()

    def _connect(self) -> sqlite3.Connection:
        self._path.touch(mode=0o600, exist_ok=True)
        self._inode = self._path.stat().st_ino
        connection = sqlite3.connect(self._path, timeout=5.0)
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = normal")
        if self._max_pages is not None:
            connection.execute(f"pragma max_page_count = {int(self._max_pages)}")
        connection.execute(TABLE)
        connection.commit()
        return connection

    def _close_if_moved(self, connection: sqlite3.Connection) -> sqlite3.Connection | None:
        """Close a file that was moved away or deleted, as by logrotate, with all its rows in it."""
        if self._path.exists() and self._path.stat().st_ino == self._inode:
            return connection
        # Closing alone would leave the rows in a write-ahead log whose file is elsewhere now.
        connection.execute("pragma wal_checkpoint(truncate)")
        connection.close()
        return None

    def observe(self, observation: Observation) -> None:
        """Queue a finished request; does not block."""
        try:
            self._queue.put_nowait(self._make_row(observation))
        except queue.Full:
            self._dropped(1)

    def _make_row(self, observation: Observation) -> Row:
        """Return the values to write; the writer thread redacts the texts."""
        records, started = observation.attempts, observation.started
        answer = observation.answer or (records[-1] if records else None)
        usage = answer.usage if answer and answer.usage and answer.usage.is_reported else None
        ended = observation.ended if observation.ended is not None else started
        first = observation.first
        attempts = [
            {"backend": a.backend, "role": a.role, "cause": a.cause, "checks": a.failures}
            for a in records
        ]
        texts: tuple[Any, Any] = (None, None)
        if self._texts:
            answers = {choice: answer.text(choice) for choice in answer.choices} if answer else {}
            # Cut before they are queued: whole bodies could fill the memory.
            texts = (_Cutter().cut(observation.call.body), _Cutter().cut(answers))
        return (
            datetime.now(UTC).isoformat(timespec="milliseconds"),
            observation.call.id,
            observation.call.key,
            observation.call.kind,
            observation.served.model,
            observation.served.backend,
            observation.served.version,
            observation.served.reason,
            observation.status,
            observation.error,
            ended - started,
            None if first is None else first - started,
            usage.prompt_tokens if usage else None,
            usage.completion_tokens if usage else None,
            json.dumps(answer.failures if answer else ()),
            json.dumps(attempts),
            *texts,
        )

    def _write_all(self) -> None:
        connection: sqlite3.Connection | None = None
        while True:
            rows = [self._queue.get()]
            while len(rows) < MAX_BATCH and not self._queue.empty():
                rows.append(self._queue.get_nowait())
            batch = [row for row in rows if row is not None]
            try:
                if connection is not None:
                    connection = self._close_if_moved(connection)
                connection = connection or self._connect()
                self._write(connection, [redact_row(row) for row in batch])
                self._has_reported = False
            except Exception:
                # Any error: if the thread ended, later rows would be lost without a message.
                if not self._has_reported:
                    log.exception("cannot write to the request log '%s'", self._path)
                self._has_reported = True
                self._dropped(len(batch))
                if connection is not None:
                    connection.close()
                connection = None
            if None in rows:
                break
        if connection is not None:
            connection.close()

    def _write(self, connection: sqlite3.Connection, rows: list[Row]) -> None:
        with connection:
            placeholders = ", ".join("?" * COLUMNS)
            connection.executemany(f"insert into requests values ({placeholders})", rows)
        self._since_trim += len(rows)
        if self._since_trim >= min(TRIM_EVERY, self._rows):
            self._since_trim = 0
            with connection:
                connection.execute(
                    "delete from requests where rowid <= "
                    "(select max(rowid) from requests) - ?", (self._rows,)
                )  # fmt: skip

    def close(self) -> None:
        """Write the queued rows, within the time limit, and stop."""
        try:
            self._queue.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(timeout=CLOSE_SECONDS)
        except queue.Full:
            pass  # reported below, like a thread that does not end
        if self._thread.is_alive():
            log.warning(
                "closing the request log '%s': about %d requests were not written",
                self._path,
                self._queue.qsize(),
            )


def redact_row(row: Row) -> Row:
    """Redact the error message and the texts of a row; the texts become JSON."""
    *values, request, answer = row
    values[ERROR_COLUMN] = redact(values[ERROR_COLUMN])
    texts = [None if text is None else _to_json(text) for text in (request, answer)]
    return (*values, *texts)


def _to_json(value: Any) -> str:
    # Redacted before: JSON writes a line break as \n, and that "n" would join the next word.
    return json.dumps(redact_nested(value), ensure_ascii=False, default=str)


def redact_nested(value: Any) -> Any:
    """Redact the texts of a nested structure, keys included."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact_nested(key): redact_nested(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [redact_nested(entry) for entry in value]
    return value


class _Cutter:
    """Copies the beginning of a nested structure, up to a number of characters."""

    def __init__(self) -> None:
        self._left = MAX_TEXT_CHARACTERS

    def cut(self, value: Any) -> Any:
        """Copy a value; texts, lists and objects end where no characters are left."""
        self._left -= ITEM_CHARACTERS
        if isinstance(value, str):
            return self._cut_text(value)
        if isinstance(value, Mapping):
            return {
                self.cut(key): self.cut(entry) for key, entry in value.items() if self._left > 0
            }
        if isinstance(value, list | tuple):
            return [self.cut(entry) for entry in value if self._left > 0]
        return value

    def _cut_text(self, text: str) -> str:
        start = text[: max(self._left, 0)]
        self._left -= len(start)
        if len(start) < len(text):
            # The last word may be the beginning of a secret, which no pattern would match.
            ends = start.rfind(" "), start.rfind("\n"), len(start) - MAX_SECRET_CHARACTERS, 0
            start = start[: max(ends)]
        return start
