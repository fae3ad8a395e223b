"""ASGI middleware that checks the Host header and the API key of every request.

Without API keys the server is meant for this machine only, so the Host header must name this
machine: otherwise a web page in a local browser could reach the server by DNS rebinding.
"""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from halfbyte.errors import ServeError
from halfbyte.serve.api.error_responses import error_response
from halfbyte.serve.config import is_loopback
from halfbyte.serve.keys import ApiKeys


class AccessControl:
    """Passes on authorized requests, with the key's name in the request's state."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        open_paths: Collection[str],
        hosts: Collection[str],
    ) -> None:
        """Wrap an application.

        Args:
            app: The application to protect.
            keys: The accepted API keys; if empty, every client on this machine has access.
            open_paths: Paths that need no key.
            hosts: Allowed Host names, besides loopback ones, of a server without keys.
        """
        self._app = app
        self._keys = keys
        self._open = frozenset(open_paths)
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and pass it on, or answer with an error."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        try:
            name = self._authorize(scope["path"], headers)
        except ServeError as error:
            await error_response(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["key"] = name
        await self._app(scope, receive, send)

    def _authorize(self, path: str, headers: Headers) -> str:
        """Return the name of the request's key, empty if none is needed."""
        if not self._keys:
            self._check_host(headers.get("host", ""))
            return ""
        if path in self._open:
            return ""
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        name = self._keys.find(secret.strip()) if scheme.lower() == "bearer" else None
        if name is None:
            raise ServeError(
                "No valid API key was given. Send one as 'Authorization: Bearer KEY'.",
                status=401,
                code="invalid_api_key",
            )
        return name

    def _check_host(self, host: str) -> None:
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        name = name.strip("[]").lower()
        if not (is_loopback(name) or name in self._hosts):
            raise ServeError(
                "This server has no API keys, so it accepts only requests addressed to this "
                f"machine, not to '{name[:80]}'. Start it with --api-key or --allowed-host.",
                status=421,
                code="wrong_host",
            )
