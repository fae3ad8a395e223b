"""A local stand-in for the Hugging Face Hub, with the endpoints that push and pull use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def put_into_cache(cache: Path, name: str, revision: str) -> Path:
    """Create the cache folder of a repository's revision, as huggingface_hub lays it out."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(revision.encode()).hexdigest()
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


class Hub:
    """Repositories in memory with one branch each; large files use the LFS protocol."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = {}
        self.large: dict[str, bytes] = {}
        self.private: dict[str, bool] = {}
        self.url = ""

    def commit(self, name: str, lines: list[dict[str, Any]]) -> str:
        files = self.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        self.commits[name].append(hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest())
        return self.commits[name][-1]


@contextmanager
def run_hub() -> Iterator[Hub]:
    """Serve a hub on a free local port."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, code: int = 200) -> None:
        self._send(code, json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        hub, body = self.state, self._body()
        if self.path == "/api/repos/create":
            requested = json.loads(body)
            name = "/".join(
                filter(None, [requested.get("organization") or "me", requested["name"]])
            )
            hub.repositories.setdefault(name, {})
            hub.private[name] = requested.get("visibility") == "private" or requested.get(
                "private", False
            )
            hub.commits.setdefault(name, ["0" * 40])
            self._json({"url": f"{hub.url}/{name}"})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main.*", self.path):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            self._json({"files": modes})
        elif match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", self.path):
            objects = [
                {
                    **requested,
                    "actions": {
                        "upload": {"href": f"{hub.url}/lfs/{requested['oid']}", "header": {}}
                    },
                }
                for requested in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main.*", self.path):
            lines = [json.loads(line) for line in body.splitlines() if line]
            commit = hub.commit(match[1], lines)
            url = f"{hub.url}/{match[1]}/commit/{commit}"
            self._json({"success": True, "commitOid": commit, "commitUrl": url})
        else:
            self._json({"error": f"no POST {self.path}"}, 404)

    def do_PUT(self) -> None:
        content = self._body()
        assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/lfs/")
        self.state.large[self.path.removeprefix("/lfs/")] = content
        self._send(200)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.state, self.path.partition("?")[0]
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            files = hub.repositories.get(match[1], {})
            if match[3] not in files:
                self._send(404, b"", X_Error_Code="EntryNotFound")
                return
            content = files[match[3]]
            digest = hashlib.sha256(content).hexdigest()
            commit = hub.commits[match[1]][-1]
            self._send(200, content, ETag=f'"{digest}"', X_Repo_Commit=commit)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            files = hub.repositories[match[1]]
            self._json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                    for name, content in sorted(files.items())
                ]
            )
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            if match[1] not in hub.repositories:
                self._send(404, b"", X_Error_Code="RepoNotFound")
                return
            siblings = [{"rfilename": name} for name in sorted(hub.repositories[match[1]])]
            sha = hub.commits[match[1]][-1]
            self._json({"id": match[1], "modelId": match[1], "sha": sha, "siblings": siblings})
        else:
            self._json({"error": f"no GET {path}"}, 404)
