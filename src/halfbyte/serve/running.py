"""A server from its first connection to its last: it binds, says so, and drains when told to stop.

::

    SIGTERM, SIGINT or SIGHUP ──> not ready, new requests refused, running ones finish ──> exit 0
    the same again, or drain_seconds over ──> running ones are cut off ──> exit 0
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import ExitStack, contextmanager
from types import FrameType

import uvicorn

from halfbyte.errors import ConfigError
from halfbyte.serve.api.app import build_app
from halfbyte.serve.api.connection import Connection
from halfbyte.serve.api.gateway import Gateway

logger = logging.getLogger(__name__)

CONNECTIONS_WAITING = 512
KEEP_ALIVE_SECONDS = 30
CUT_OFF_SECONDS = 2
"""For cut-off answers to be closed."""


class DrainingServer(uvicorn.Server):
    """Stops taking requests long before it stops answering them."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        """Prepare.

        Args:
            config: Uvicorn's.
            gateway: Whose requests finish first.
        """
        super().__init__(config)
        self._gateway = gateway
        self._cut_off: float | None = None

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Drain too when the terminal is closed, unless that is ignored, as under nohup."""
        hangup = getattr(signal, "SIGHUP", None)
        is_main = threading.current_thread() is threading.main_thread()
        with super().capture_signals():
            if hangup is None or not is_main or signal.getsignal(hangup) != signal.SIG_DFL:
                yield
                return
            signal.signal(hangup, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(hangup, signal.SIG_DFL)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; the second time, end."""
        if self._gateway.draining:
            self.should_exit = True
        self.drain()

    def drain(self) -> None:
        """Take no new requests, and end when the running ones are done."""
        self._gateway.draining = True
        self._cut_off = time.monotonic() + self._gateway.config.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Tell uvicorn, ten times a second, whether to end."""
        if self._cut_off is not None:
            running = self._gateway.limits.running
            if not running:
                self.should_exit = True
            elif time.monotonic() > self._cut_off:
                logger.warning("%d answers are cut off: they took too long to finish.", running)
                self.should_exit = True
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """Take an address before a model is loaded for it.

    Args:
        host: Name or address.
        port: 0: any that is free.

    Returns:
        The socket, bound and not listening yet.

    Raises:
        ConfigError: It is taken, or none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with ExitStack() as stack:
            # With its protocol: asyncio sends small pieces at once only where it knows of TCP.
            bound = stack.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            stack.pop_all()
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}. Choose another with "
            "--port or --host."
        ) from error
    return bound


async def run_server(
    gateway: Gateway,
    bound: socket.socket,
    *,
    start: Callable[[], Awaitable[None]] | None = None,
    stop: Callable[[], Awaitable[None]] | None = None,
    on_ready: Callable[[DrainingServer], None] | None = None,
) -> None:
    """Serve until a signal says stop.

    Args:
        gateway: What is served.
        bound: Where.
        start: Done before the first request.
        stop: Done after the last one, in any case.
        on_ready: Called when connections are taken.

    Raises:
        ConfigError: Another program has begun to listen there in the meantime.
    """
    server = DrainingServer(make_uvicorn_config(gateway), gateway)
    try:
        if start is not None:
            await start()
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if on_ready is not None and server.started:
            on_ready(server)
        try:
            await serving
        except OSError as error:
            # To bind is not yet to listen: until then another program may come first.
            raise ConfigError(f"Cannot listen: {error.strerror or error}.") from error
        if cut_off := list(server.server_state.tasks):
            # Uvicorn cancels them and does not wait; they have something to free.
            await asyncio.wait(cut_off, timeout=CUT_OFF_SECONDS)
    finally:
        if stop is not None:
            await stop()


def make_uvicorn_config(gateway: Gateway) -> uvicorn.Config:
    """Make uvicorn's settings.

    Args:
        gateway: What is served.

    Returns:
        The settings; logging is left to whoever starts the server.
    """
    return uvicorn.Config(
        build_app(gateway),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        http=Connection,
        backlog=CONNECTIONS_WAITING,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CUT_OFF_SECONDS,
    )
