"""Run the server: bind the address, serve, and shut down gracefully on a signal.

::

    SIGTERM, SIGINT or SIGHUP ──> not ready, new requests rejected, running ones finish ──> exit 0
    a second signal, or drain_seconds passed ──> running requests are cancelled ──> exit 0
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

LISTEN_BACKLOG = 512
KEEP_ALIVE_SECONDS = 30
CANCEL_SECONDS = 2
"""Time for cancelled requests to clean up."""


class DrainingServer(uvicorn.Server):
    """A uvicorn server that finishes running requests before it exits."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        """Create the server.

        Args:
            config: Uvicorn's configuration.
            gateway: Counts the running requests.
        """
        super().__init__(config)
        self._gateway = gateway
        self._drain_deadline: float | None = None

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle SIGHUP (a closed terminal) too, unless it is ignored, as under nohup."""
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
        """Start draining; on a second signal, exit."""
        if self._gateway.draining:
            self.should_exit = True
        self.drain()

    def drain(self) -> None:
        """Reject new requests, and exit when the running ones are done."""
        self._gateway.draining = True
        self._drain_deadline = time.monotonic() + self._gateway.config.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Return whether to exit; uvicorn calls this ten times a second."""
        if self._drain_deadline is not None:
            running = self._gateway.limits.running
            if not running:
                self.should_exit = True
            elif time.monotonic() > self._drain_deadline:
                logger.warning(
                    "Cancelling %d answers that did not finish within %g s (--drain-seconds).",
                    running,
                    self._gateway.config.drain_seconds,
                )
                self.should_exit = True
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """Bind the server's address; done before the model is loaded, so that errors show early.

    Args:
        host: Host name or IP address.
        port: 0 selects a free port.

    Returns:
        The socket, bound but not listening yet.

    Raises:
        ConfigError: The address is in use, or does not belong to this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with ExitStack() as stack:
            # With the protocol set: asyncio sets TCP_NODELAY only on sockets known to be TCP.
            bound = stack.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            stack.pop_all()
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}. Choose another "
            "address with --port or --host."
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
    """Serve until a signal requests shutdown.

    Args:
        gateway: The gateway to serve.
        bound: The socket, bound to the server's address.
        start: Awaited before the first request.
        stop: Awaited after the last request, even after an error.
        on_ready: Called when the server accepts connections.

    Raises:
        ConfigError: Another program has started to listen on the address in the meantime.
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
            # Between bind and listen another program may start to listen on the address.
            raise ConfigError(
                f"Cannot listen: {error.strerror or error}. Choose another address with --port or "
                "--host."
            ) from error
        if cancelled := list(server.server_state.tasks):
            # Uvicorn cancels them but does not wait until they have released their resources.
            await asyncio.wait(cancelled, timeout=CANCEL_SECONDS)
    finally:
        if stop is not None:
            await stop()


def make_uvicorn_config(gateway: Gateway) -> uvicorn.Config:
    """Make uvicorn's configuration.

    Args:
        gateway: The gateway to serve.

    Returns:
        The configuration; logging is left to the caller.
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
        backlog=LISTEN_BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CANCEL_SECONDS,
    )
