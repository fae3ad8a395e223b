"""Requests and answers in SQLite, redacted; written by a thread that no request waits for.

A disk that is full, or any other trouble, costs rows and nothing else: they are counted as dropped
and the log goes on when there is room again. The newest rows are kept, up to a number.
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

LONGEST_QUEUE = 1000
MOST_AT_ONCE = 200
"""Rows of one transaction."""
TRIM_EVERY = 1000
"""Rows between two looks at how many there are."""
LONGEST_TEXT = 100_000
"""Characters kept of one text."""
CLOSE_SECONDS = 10.0
"""For what waits to be written."""

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

_AFTER_ESCAPE = r"(?<=\\[nrt])"
"""Where JSON within a text, such as a tool call's arguments, writes the start of a line."""
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
"""What is replaced by ``[name]``. A safety net: it knows forms, not meanings, such as names."""

Row = tuple[Any, ...]


def redact(text: str) -> str:
    """Replace what looks like a person's or a secret's mark.

    Args:
        text: Anything.

    Returns:
        The text with ``[email]``, ``[secret]``, ``[iban]``, ``[card]``, ``[phone]`` and
        ``[address]`` in their places.
    """
    for name, pattern in REDACTIONS:
        text = pattern.sub(f"[{name}]", text)
    return text


class RequestLog:
    """The log, and the thread that writes it."""

    def __init__(
        self,
        path: Path,
        *,
        texts: bool = True,
        rows: int = 1_000_000,
        dropped: Callable[[int], None] | None = None,
        max_pages: int | None = None,
    ) -> None:
        """Open it.

        Args:
            path: The SQLite file; made where it is missing, readable by its owner only.
            texts: Keep texts, redacted; else figures only.
            rows: That are kept, the newest.
            dropped: Told how many rows were lost.
            max_pages: Of 4096 bytes that the file may have; None: no limit but the disk's.

        Raises:
            ConfigError: It cannot be written.
        """
        self._path = path
        self._texts = texts
        self._rows = rows
        self._dropped = dropped or (lambda count: None)
        self._max_pages = max_pages
        self._queue: queue.Queue[Row | None] = queue.Queue(LONGEST_QUEUE)
        self._since_trim = 0
        self._told = False
        try:
            path.touch(mode=0o600, exist_ok=True)
            self._connect().close()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"Cannot write the request log '{path}': {error}. Choose another file."
            ) from error
        self._thread = threading.Thread(target=self._write_all, name="request-log", daemon=True)
        self._thread.start()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=5.0)
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = normal")
        if self._max_pages is not None:
            connection.execute(f"pragma max_page_count = {int(self._max_pages)}")
        connection.execute(TABLE)
        connection.commit()
        return connection

    def observe(self, seen: Observation) -> None:
        """Note a request that is over; returns at once."""
        try:
            self._queue.put_nowait(self._row(seen))
        except queue.Full:
            self._dropped(1)

    def _row(self, seen: Observation) -> Row:
        """Give what is written, but for redaction, which the thread does."""
        answer = seen.answer or (seen.attempts[-1] if seen.attempts else None)
        usage = answer.usage if answer and answer.usage and answer.usage.is_reported else None
        ended = seen.ended if seen.ended is not None else seen.started
        attempts = [
            {"backend": a.backend, "role": a.role, "cause": a.cause, "checks": a.failures}
            for a in seen.attempts
        ]
        texts: tuple[Any, Any] = (None, None)
        if self._texts:
            answers = {choice: answer.text(choice) for choice in answer.choices} if answer else {}
            texts = (seen.call.body, answers)
        return (
            datetime.now(UTC).isoformat(timespec="milliseconds"),
            seen.call.id,
            seen.call.key,
            seen.call.kind,
            seen.served.model,
            seen.served.backend,
            seen.served.version,
            seen.served.reason,
            seen.status,
            seen.error,
            ended - seen.started,
            None if seen.first is None else seen.first - seen.started,
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
            while len(rows) < MOST_AT_ONCE and not self._queue.empty():
                rows.append(self._queue.get_nowait())
            wanted = [row for row in rows if row is not None]
            try:
                connection = connection or self._connect()
                self._write(connection, [redacted(row) for row in wanted])
                self._told = False
            except Exception:
                # Whatever it is: a log that ended would fill the queue, and tell nobody.
                if not self._told:
                    log.exception("the request log '%s' is not written", self._path)
                self._told = True
                self._dropped(len(wanted))
                if connection is not None:
                    connection.close()
                connection = None
            if None in rows:
                break
        if connection is not None:
            connection.close()

    def _write(self, connection: sqlite3.Connection, rows: list[Row]) -> None:
        with connection:
            marks = ", ".join("?" * COLUMNS)
            connection.executemany(f"insert into requests values ({marks})", rows)
        self._since_trim += len(rows)
        if self._since_trim >= min(TRIM_EVERY, self._rows):
            self._since_trim = 0
            with connection:
                connection.execute(
                    "delete from requests where rowid <= "
                    "(select max(rowid) from requests) - ?", (self._rows,)
                )  # fmt: skip

    def close(self) -> None:
        """Write what waits, then stop; a disk that takes too long is not waited for."""
        try:
            self._queue.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(timeout=CLOSE_SECONDS)
        except queue.Full:
            pass  # told below, as a thread that does not end is
        if self._thread.is_alive():
            log.warning(
                "the request log '%s' is left with about %d requests that are not written",
                self._path,
                self._queue.qsize(),
            )


def redacted(row: Row) -> Row:
    """Give a row with its texts redacted, as JSON."""
    *figures, request, answer = row
    figures[9] = redact(figures[9])
    texts = [None if text is None else _as_json(text) for text in (request, answer)]
    return (*figures, *texts)


def _as_json(value: Any) -> str:
    # Redacted first: in JSON the start of a line is an "n", and what follows no word of its own.
    return json.dumps(_redact_within(value), ensure_ascii=False, default=str)[:LONGEST_TEXT]


def _redact_within(value: Any) -> Any:
    """Redact every text of a structure, keys too."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {_redact_within(key): _redact_within(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_redact_within(entry) for entry in value]
    return value
