"""The addresses of other servers: whose turn it is, and who is left alone for a while."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from halfbyte.errors import ConfigError

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0


@dataclass(slots=True)
class Host:
    """One address, and how it does."""

    address: str
    models: tuple[str, ...] = ()
    running: int = 0
    pause: float = 0.0
    down_until: float = 0.0
    busy_until: float = 0.0

    @property
    def name(self) -> str:
        """Host and port."""
        return urlsplit(self.address).netloc.rpartition("@")[2]

    @property
    def is_up(self) -> bool:
        """Whether it may be asked."""
        return time.monotonic() >= self.down_until

    @property
    def is_free(self) -> bool:
        """Whether it may be asked, and has not said that it has too much to do."""
        return time.monotonic() >= max(self.down_until, self.busy_until)

    def note_busy(self, seconds: float | None) -> None:
        """Ask others first for as long as it says; it answers, so it is not down."""
        self.busy_until = time.monotonic() + (FIRST_PAUSE_SECONDS if seconds is None else seconds)

    def note_failure(self) -> None:
        """Leave it alone for a while, each time for longer."""
        self.pause = min(LONGEST_PAUSE_SECONDS, self.pause * 2 or FIRST_PAUSE_SECONDS)
        self.down_until = time.monotonic() + self.pause

    def note_success(self) -> None:
        """It answers."""
        self.pause = self.down_until = 0.0


def read_addresses(addresses: Sequence[str]) -> tuple[list[Host], str | None]:
    """Read addresses as they are given on the command line.

    Args:
        addresses: Up to and with ``/v1``; a model's name may follow after ``#``.

    Returns:
        The hosts, and the model that was named last; None where none was.

    Raises:
        ConfigError: There is none, or one is no address.
    """
    if not addresses:
        raise ConfigError("No upstream address was given.")
    hosts, model = [], None
    for entry in addresses:
        address, _, wanted = entry.partition("#")
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"'{entry}' is no address of a server. One looks like http://host:8000/v1."
            )
        hosts.append(Host(address.rstrip("/")))
        model = wanted or model
    return hosts, model


def order_hosts(hosts: Sequence[Host], turn: int) -> list[Host]:
    """Give those that are up, one after the other, those that have too much to do last.

    Args:
        hosts: At least one.
        turn: Of how many requests this is; the next one begins with the next host.

    Returns:
        In the order in which they are asked; where none is up, the one that comes back first.
    """
    first = turn % len(hosts)
    order = [*hosts[first:], *hosts[:first]]
    up = sorted((host for host in order if host.is_up), key=lambda host: not host.is_free)
    return up or [min(order, key=lambda host: host.down_until)]
