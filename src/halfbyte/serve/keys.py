"""API keys: a name and the hash of a secret; the secret itself is not kept."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import ConfigError

logger = logging.getLogger(__name__)

MIN_SECRET_CHARACTERS = 8
POLL_SECONDS = 2.0
"""Time after which a change of the key file takes effect."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HASHED = re.compile(r"sha256:([0-9a-f]{64})", re.IGNORECASE)


@dataclass(slots=True)
class ApiKeys:
    """The API keys that the server accepts."""

    hashes: tuple[tuple[str, bytes], ...] = ()
    """Name and SHA-256 of the secret, per key. Replaced when the key file changes."""

    @classmethod
    def parse(cls, entries: Iterable[str]) -> ApiKeys:
        """Parse keys.

        Args:
            entries: Each ``NAME:SECRET``, ``NAME:sha256:HEX`` or a secret alone.

        Returns:
            The keys.

        Raises:
            ConfigError: A key is malformed or a name is used twice. No message shows a secret.
        """
        hashes: dict[str, bytes] = {}
        for number, entry in enumerate(entries, 1):
            name, secret = _split(number, entry.strip())
            if name in hashes:
                raise ConfigError(f"Two API keys are named '{name}'. Give each a different name.")
            hashes[name] = _hash_entry(name, secret)
        return cls(tuple(hashes.items()))

    def __bool__(self) -> bool:
        """Return whether any key is set."""
        return bool(self.hashes)

    def find(self, secret: str) -> str | None:
        """Find the key with a secret, in constant time.

        Args:
            secret: As sent by the client.

        Returns:
            The key's name; None if no key has this secret.
        """
        given = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
        found = None
        for name, known in self.hashes:
            if hmac.compare_digest(given, known):
                found = name
        return found


class KeyFile:
    """Follows the key file, so that keys are added and revoked without a restart."""

    def __init__(self, path: Path, keys: ApiKeys, read: Callable[[], ApiKeys]) -> None:
        """Prepare to follow.

        Args:
            path: The file.
            keys: The accepted keys, which are replaced.
            read: Reads all keys again, those from elsewhere included.
        """
        self._path = path
        self._keys = keys
        self._read = read
        self._state = ""
        """What the file was like when it was read last."""

    async def follow(self) -> None:
        """Read the file again whenever it changes, until cancelled."""
        while True:
            self.poll()
            await asyncio.sleep(POLL_SECONDS)

    def poll(self) -> None:
        """Read the keys again if the file has changed; an invalid file changes nothing."""
        try:
            found = self._path.stat()
            # The time of the last change of content, mode or name.
            state = f"{found.st_ctime_ns} {found.st_ino}"
        except OSError as error:
            state = str(error)
        if state == self._state:
            return
        self._state = state
        problem = f"'{self._path}' has none."
        try:
            hashes = self._read().hashes
        except ConfigError as error:
            hashes, problem = (), str(error)
        if not hashes:
            # Without any key, everyone would have access.
            logger.error("The API keys stay as they are: %s", problem)
        elif hashes != self._keys.hashes:
            self._keys.hashes = hashes
            logger.info("The API keys are replaced by the %d of '%s'.", len(hashes), self._path)


def read_key_file(path: Path) -> list[str]:
    """Read a file of keys.

    Args:
        path: A text file with one key per line; empty lines and lines that start with # are
            ignored.

    Returns:
        The lines with keys.

    Raises:
        ConfigError: The file cannot be read, or is readable by other users.
    """
    try:
        text = path.read_text(encoding="utf-8")
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the API keys in '{path}': {error}.") from error
    if mode & 0o004:
        raise ConfigError(
            f"The API key file '{path}' is readable by every user of this machine (mode "
            f"{mode & 0o777:o}). Run: chmod 600 {path}"
        )
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _split(number: int, entry: str) -> tuple[str, str]:
    name, colon, secret = entry.partition(":")
    if name.lower() == "sha256":
        raise ConfigError(f"API key {number} is a hash without a name. Write NAME:sha256:HEX.")
    if not colon:
        return f"key{number}", entry
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"API key {number} has an invalid name: use 1 to 64 letters, digits, '.', '_' or '-'. "
            "Write a key as NAME:SECRET."
        )
    return name, secret


def _hash_entry(name: str, secret: str) -> bytes:
    if match := _HASHED.fullmatch(secret):
        return bytes.fromhex(match[1])
    if secret.lower().startswith("sha256:"):
        raise ConfigError(
            f"API key '{name}' has an invalid hash: sha256: must be followed by 64 hexadecimal "
            f"digits, found {len(secret) - len('sha256:')} characters."
        )
    if len(secret) < MIN_SECRET_CHARACTERS or not secret.isascii() or not secret.isprintable():
        raise ConfigError(
            f"The secret of API key '{name}' has {len(secret)} characters; it must have at least "
            f"{MIN_SECRET_CHARACTERS}, all printable ASCII. To make one: python -c "
            '"import secrets; print(secrets.token_urlsafe(32))"'
        )
    if " " in secret:
        raise ConfigError(
            f"The secret of API key '{name}' contains a space, which an HTTP header cannot carry. "
            "Use a secret without spaces."
        )
    return hashlib.sha256(secret.encode()).digest()
