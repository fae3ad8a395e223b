"""The addresses of upstream servers, their state, and the order in which they are asked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from halfbyte.errors import ConfigError
from halfbyte.serve.config import is_http_address

FIRST_PAUSE_SECONDS = 1.0
MAX_PAUSE_SECONDS = 30.0


@dataclass(slots=True)
class Host:
    """One upstream server and its state."""

    address: str
    models: tuple[str, ...] = ()
    running: int = 0
    """Requests of this process that are running there."""
    pause: float = 0.0
    """Length of the last pause after a failure, in seconds."""
    down_until: float = 0.0
    """Until then it is not asked; seconds of :func:`time.monotonic`, like `busy_until`."""
    busy_until: float = 0.0
    """Until then other hosts are asked first."""

    @property
    def name(self) -> str:
        """Host and port, without credentials."""
        return urlsplit(self.address).netloc.rpartition("@")[2]

    @property
    def is_up(self) -> bool:
        """Whether it may be asked."""
        return time.monotonic() >= self.down_until

    @property
    def is_free(self) -> bool:
        """Whether it may be asked and has not reported that it is overloaded."""
        return time.monotonic() >= max(self.down_until, self.busy_until)

    def record_busy(self, seconds: float | None) -> None:
        """Record that it is overloaded.

        Args:
            seconds: Its Retry-After; None: it sent none.
        """
        self.busy_until = time.monotonic() + (FIRST_PAUSE_SECONDS if seconds is None else seconds)

    def record_failure(self) -> None:
        """Record that it cannot be reached; the pause doubles each time."""
        self.pause = min(MAX_PAUSE_SECONDS, self.pause * 2 or FIRST_PAUSE_SECONDS)
        self.down_until = time.monotonic() + self.pause

    def record_success(self) -> None:
        """Record that it answered."""
        self.pause = self.down_until = 0.0


def read_addresses(addresses: Sequence[str]) -> tuple[list[Host], str | None]:
    """Parse addresses given on the command line.

    Args:
        addresses: URLs up to and including ``/v1``; a model's name may follow after ``#``.

    Returns:
        The hosts, and the last model that was named; None if none was.

    Raises:
        ConfigError: There is no address, or one is invalid.
    """
    if not addresses:
        raise ConfigError("No upstream address was given. Give one with --upstream.")
    hosts, model = [], None
    for entry in addresses:
        address, _, named = entry.partition("#")
        if not is_http_address(address):
            raise ConfigError(
                f"'{entry}' is not the address of a server. Use the form http://host:8000/v1."
            )
        hosts.append(Host(address.rstrip("/")))
        model = named or model
    return hosts, model


def order_hosts(hosts: Sequence[Host], turn: int) -> list[Host]:
    """Order the hosts for one request: round robin, overloaded ones last, without those down.

    Args:
        hosts: At least one.
        turn: Number of the request; each one starts with the next host.

    Returns:
        The hosts in the order to ask them. If all are down, the one whose pause ends first.
    """
    first = turn % len(hosts)
    order = [*hosts[first:], *hosts[:first]]
    up = sorted((host for host in order if host.is_up), key=lambda host: not host.is_free)
    return up or [min(order, key=lambda host: host.down_until)]
