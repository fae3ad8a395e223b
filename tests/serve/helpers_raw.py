"""A server that sends given bytes: invalid, slow, or incomplete."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

MODELS = json.dumps({"object": "list", "data": [{"id": "big", "object": "model"}]}).encode()


def reply(body=b"", *, status="200 OK", media="application/json", more=""):
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {media}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    )
    return head.encode() + body


def stream(*lines):
    """Return a stream without a length, which lasts until the connection closes."""
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    return head.encode() + b"".join(
        f"data: {line if isinstance(line, str) else json.dumps(line)}\n\n".encode()
        for line in lines
    )


def chunk(text=None, finish=None, index=0, **more):
    delta = {} if text is None else {"content": text}
    return {"choices": [{"index": index, "delta": delta, "finish_reason": finish, **more}]}


@dataclass
class RawServer:
    address: str
    plays: list = field(default_factory=list)
    """For each POST, the last one repeated: bytes to send, or seconds to wait."""
    seen: list = field(default_factory=list)
    """Head and body of each request."""
    left: int = 0
    """Clients that closed before all was sent."""


@contextmanager
def raw_server(*plays):
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    server = RawServer(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", list(plays))
    stopped = threading.Event()

    def handle(connection):
        with connection:
            connection.settimeout(10)
            data = b""
            while b"\r\n\r\n" not in data:
                part = connection.recv(65536)
                if not part:
                    return
                data += part
            head, _, body = data.partition(b"\r\n\r\n")
            length = 0
            for line in head.decode().lower().split("\r\n"):
                if line.startswith("content-length:"):
                    length = int(line.partition(":")[2])
            while len(body) < length:
                body += connection.recv(65536)
            if head.startswith(b"GET"):
                connection.sendall(reply(MODELS, more="Connection: close\r\n"))
                return
            server.seen.append((head.decode(), body))
            play = server.plays.pop(0) if len(server.plays) > 1 else server.plays[0]
            for part in play if isinstance(play, tuple) else (play,):
                if isinstance(part, bytes):
                    try:
                        connection.sendall(part)
                    except OSError:
                        server.left += 1
                        return
                    continue
                end = time.monotonic() + part
                connection.settimeout(0.02)
                while time.monotonic() < end and not stopped.is_set():
                    try:
                        if connection.recv(1) == b"":
                            server.left += 1
                            return
                    except TimeoutError:
                        pass
                    except OSError:
                        server.left += 1
                        return
                connection.settimeout(10)

    def accept():
        while not stopped.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            thread = threading.Thread(target=handle, args=(connection,), daemon=True)
            threads.append(thread)
            thread.start()

    threads = [threading.Thread(target=accept)]
    threads[0].start()
    try:
        yield server
    finally:
        stopped.set()
        for thread in threads:
            thread.join(10)
        listener.close()
