"""A stand-in for S3, moto's, as a process of its own; prints its port.

    python -m tests.helpers.s3_server [exact | careless | forgetful]

"careless" ignores conditions, as some S3-like servers do: it overwrites. "forgetful" does what it
is told and says that it failed, once for each log entry: what a client sees whose answer is lost.
"""

from __future__ import annotations

import sys

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

MODE = sys.argv[1] if len(sys.argv) > 1 else "exact"


class Quiet(WSGIRequestHandler):
    def log(self, *args):
        pass


class Server:
    """Moto behind what goes wrong. One request at a time: moto's own condition is no atomic one."""

    def __init__(self):
        self.moto, self.failed = DomainDispatcherApplication(create_backend_app), set()

    def __call__(self, environ, start_response):
        if MODE == "careless":
            environ.pop("HTTP_IF_NONE_MATCH", None)
        path = environ["PATH_INFO"]
        is_first = (
            "/logs/" in path and environ["REQUEST_METHOD"] == "PUT" and path not in self.failed
        )
        if MODE != "forgetful" or not is_first:
            return self.moto(environ, start_response)
        self.failed.add(path)
        list(self.moto(environ, lambda *_: None))
        start_response("503 Service Unavailable", [("Content-Length", "0")])
        return []


server = make_server("127.0.0.1", 0, Server(), threaded=False, request_handler=Quiet)
sys.stdout.write(f"{server.server_port}\n")
sys.stdout.flush()
server.serve_forever()
