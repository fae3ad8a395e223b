"""The append-only log of a name: one file per entry, each with the digest of the one before.

An entry's file is created exclusively: of two processes that write the same number one fails, reads
the log again and retries. Aliases are derived from the log, so the two cannot disagree.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from halfbyte.checkpoint.header import parse_json_object
from halfbyte.errors import CheckpointError, StoreError
from halfbyte.store.backend import Backend

EVENTS = ("add", "verdict", "promote", "rollback", "remove", "sign")
DIGITS = 8
ORIGIN = "from"
"""Key in the details of "add" for a pulled version: the repository that it came from."""
ELSEWHERE = "judged_elsewhere"
"""Key in the details of "add" for a pulled version: the verdict of the store that pushed it. It is
not "verdict", so that it never counts as a verdict of this store."""
ATTEMPTS = 1000
LISTINGS = 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_KEY = re.compile(rf"logs/([A-Za-z0-9][A-Za-z0-9._-]*)/\d{{{DIGITS}}}\.json")
"""Other files, such as .DS_Store, are ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry of a log."""

    event: str
    version: str
    alias: str | None = None
    reason: str | None = None
    details: Mapping[str, str] = field(default_factory=dict)
    """Such as a verdict and the digest of its file."""
    number: int = 0
    time: str = ""
    actor: str = ""
    previous: str = ""
    """sha256 of the entry before, in hex; empty for the first."""
    token: str = ""
    """Random, so that two entries written in the same second differ."""

    def to_bytes(self) -> bytes:
        """Return the stored form."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        """The sha256 of the stored form."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """All entries of a name's log."""

    name: str
    entries: Sequence[Entry]

    @property
    def versions(self) -> list[str]:
        """Versions that were added and not removed, oldest first."""
        found: dict[str, None] = {}
        for entry in self.entries:
            if entry.event == "add":
                found[entry.version] = None
            elif entry.event == "remove":
                found.pop(entry.version, None)
        return list(found)

    @property
    def aliases(self) -> dict[str, str]:
        """The version that each alias points to."""
        found: dict[str, str] = {}
        for entry in self.entries:
            if entry.alias is not None:
                found[entry.alias] = entry.version
        return found

    def past_of(self, alias: str) -> list[str]:
        """Versions that an alias can roll back to, oldest first, then the current one."""
        past: list[str] = []
        for entry in self.entries:
            if entry.alias != alias:
                continue
            if entry.event == "rollback" and len(past) > 1:
                past.pop()
            elif not past or past[-1] != entry.version:
                past.append(entry.version)
        return past

    def last_detail(self, version: str, key: str) -> Entry | None:
        """The newest entry of a version whose details have a key."""
        found = [e for e in self.entries if key in e.details and e.version == version]
        return found[-1] if found else None

    def verdict_elsewhere(self, version: str) -> str | None:
        """The verdict that came with a pulled version; it does not count as one of this store."""
        entry = self.last_detail(version, ELSEWHERE)
        return entry.details[ELSEWHERE] if entry else None

    def records_origin(self, version: str) -> bool:
        """Whether the log records, for each time a version was added, where it came from."""
        added = [e for e in self.entries if e.event == "add" and e.version == version]
        return all(entry.details for entry in added)


def check_name(name: str) -> str:
    """Check a model's name or an alias.

    Args:
        name: Becomes part of a key.

    Returns:
        The name.

    Raises:
        StoreError: It has other characters than allowed, or is too long.
    """
    if not _NAME.fullmatch(name):
        raise StoreError(
            f"'{name[:100]}' cannot be a name. Use at most 96 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit."
        )
    return name


def list_names(backend: Backend) -> list[str]:
    """List the names that have a log, sorted."""
    return sorted({match[1] for key in backend.list("logs") if (match := _KEY.fullmatch(key))})


def read_history(backend: Backend, name: str) -> History:
    """Read a name's log, and check that no entry is missing or changed.

    Args:
        backend: The store.
        name: The model.

    Returns:
        The log; without entries if the name is unknown.

    Raises:
        StoreError: An entry is missing or damaged, or does not follow the one before.
    """
    entries: list[Entry] = []
    for key in _list_keys(backend, name):
        number = len(entries) + 1
        if key != _key(name, number):
            raise StoreError(
                f"The log of {name} has {key} where {_key(name, number)} is expected. An entry is "
                "missing; restore it from a backup."
            )
        entry = _parse(backend.read(key), key)
        previous = entries[-1].digest if entries else ""
        if entry.number != number or entry.previous != previous:
            raise StoreError(
                f"{key} does not follow from the entry before it, so the log was changed. Restore "
                "it from a backup."
            )
        entries.append(entry)
    return History(name=name, entries=entries)


def append_entry(
    backend: Backend, name: str, decide: Callable[[History], Entry | None]
) -> Entry | None:
    """Append an entry that depends on the current log, and retry if another process was first.

    Args:
        backend: The store.
        name: The model.
        decide: Maps the log to the entry to append (event, version, alias, reason and details are
            used), or to None to append nothing. Called again for each retry.

    Returns:
        The entry as written, or None.

    Raises:
        StoreError: Every attempt failed because another process was first.
    """
    for _ in range(ATTEMPTS):
        history = read_history(backend, name)
        wanted = decide(history)
        if wanted is None:
            return None
        entry = Entry(
            event=wanted.event,
            version=wanted.version,
            alias=wanted.alias,
            reason=wanted.reason,
            details=wanted.details,
            number=len(history.entries) + 1,
            time=now(),
            actor=_actor(),
            previous=history.entries[-1].digest if history.entries else "",
            token=uuid.uuid4().hex,
        )
        if backend.put_new(_key(name, entry.number), entry.to_bytes()):
            return entry
    raise StoreError(
        f"Cannot write to the log of {name}: in each of {ATTEMPTS} attempts another process was "
        "first. Try again."
    )


def now() -> str:
    """Return the current time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _list_keys(backend: Backend, name: str) -> list[str]:
    """List a log's keys; retry if there is a gap, which a concurrent write may cause."""
    keys: list[str] = []
    for _ in range(LISTINGS):
        keys = [key for key in backend.list(f"logs/{name}") if _KEY.fullmatch(key)]
        if keys == [_key(name, number) for number in range(1, len(keys) + 1)]:
            break
    return keys


def _key(name: str, number: int) -> str:
    return f"logs/{name}/{number:0{DIGITS}}.json"


def _parse(content: bytes, key: str) -> Entry:
    try:
        values: dict[str, Any] = parse_json_object(content, key)
        entry = Entry(**values)
    except (CheckpointError, TypeError) as error:
        raise StoreError(
            f"{key} is not a log entry: {error}. It is damaged; restore it from a backup."
        ) from error
    if entry.event not in EVENTS or entry.to_bytes() != content:
        raise StoreError(
            f"{key} is not a valid log entry. It is damaged; restore it from a backup."
        )
    return entry


def _actor() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
