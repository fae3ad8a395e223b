"""A gateway on a real port, in a thread with its own event loop."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from dataclasses import dataclass

from halfbyte.serve.api.gateway import Gateway
from halfbyte.serve.running import bind, run_server


@dataclass
class Running:
    address: str
    gateway: Gateway
    loop: asyncio.AbstractEventLoop
    server: object = None

    @property
    def v1(self):
        return f"{self.address}/v1"

    def call(self, coroutine):
        """Run something on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)


@contextmanager
def serve(gateway: Gateway):
    """Serve until the block is left; then drain, as a signal would."""
    bound = bind("127.0.0.1", 0)
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    running = Running(f"http://127.0.0.1:{bound.getsockname()[1]}", gateway, loop)
    failures = []

    def start(server):
        running.server = server
        ready.set()

    def work():
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(run_server(gateway, bound, on_ready=start))
        except BaseException as error:  # noqa: BLE001
            failures.append(error)
            ready.set()
        finally:
            loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert ready.wait(20)
        assert not failures, failures
        yield running
    finally:
        if running.server is not None:
            loop.call_soon_threadsafe(running.server.drain)
        thread.join(20)
        bound.close()
        assert not thread.is_alive()
        assert not failures, failures
