"""Moto's stand-in for S3 as a separate process; prints its port.

    python -m tests.helpers.s3_server [exact | careless | forgetful]

"careless" ignores conditions and overwrites, as some S3-compatible servers do. "forgetful" executes
the first write of each log entry but replies with an error, like a lost response.
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
    """Moto with injected faults, one request at a time: moto's conditions are not atomic."""

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
