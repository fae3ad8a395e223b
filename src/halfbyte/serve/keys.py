"""API keys: a name and a secret, of which only the hash is kept."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import ConfigError

LEAST_SECRET = 8
"""Characters."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HASHED = re.compile(r"sha256:([0-9a-f]{64})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """Who may ask."""

    hashes: tuple[tuple[str, bytes], ...] = ()
    """Names, and SHA-256 of the secrets."""

    @classmethod
    def parse(cls, entries: Iterable[str]) -> ApiKeys:
        """Read keys.

        Args:
            entries: Each ``NAME:SECRET``, ``NAME:sha256:HEX`` or a secret alone.

        Returns:
            The keys.

        Raises:
            ConfigError: One is malformed, or two have one name. No message holds a secret.
        """
        hashes: dict[str, bytes] = {}
        for number, entry in enumerate(entries, 1):
            name, secret = _split(number, entry.strip())
            if name in hashes:
                raise ConfigError(f"Two API keys are called '{name}'. Give each its own name.")
            hashes[name] = _hash_entry(name, secret)
        return cls(tuple(hashes.items()))

    def __bool__(self) -> bool:
        """Tell whether there is any."""
        return bool(self.hashes)

    def find(self, secret: str) -> str | None:
        """Tell whose secret this is.

        Args:
            secret: As the client gave it.

        Returns:
            The key's name; None where nobody's. It takes the same time either way.
        """
        given = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
        found = None
        for name, known in self.hashes:
            if hmac.compare_digest(given, known):
                found = name
        return found


def read_key_file(path: Path) -> list[str]:
    """Read a file of keys.

    Args:
        path: One key a line; empty lines and lines that begin with # say nothing.

    Returns:
        The lines that hold keys.

    Raises:
        ConfigError: The file cannot be read, or others on this machine may read it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the API keys in '{path}': {error}.") from error
    if mode & 0o004:
        raise ConfigError(
            f"Everybody on this machine may read the API keys in '{path}' (mode "
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
            f"The name of API key {number} is not one: it may have up to 64 letters, digits, "
            "'.', '_' and '-'. A key is given as NAME:SECRET."
        )
    return name, secret


def _hash_entry(name: str, secret: str) -> bytes:
    if match := _HASHED.fullmatch(secret):
        return bytes.fromhex(match[1])
    if secret.lower().startswith("sha256:"):
        raise ConfigError(
            f"The hash of API key '{name}' is none: after sha256: come 64 hexadecimal digits, not "
            f"{len(secret) - len('sha256:')} characters."
        )
    if len(secret) < LEAST_SECRET or not secret.isascii() or not secret.isprintable():
        raise ConfigError(
            f"The secret of API key '{name}' has {len(secret)} characters; it needs {LEAST_SECRET} "
            "printable ASCII characters at least. A good one: python -c "
            '"import secrets; print(secrets.token_urlsafe(32))"'
        )
    if " " in secret:
        raise ConfigError(f"The secret of API key '{name}' holds a space; a header cannot.")
    return hashlib.sha256(secret.encode()).digest()
