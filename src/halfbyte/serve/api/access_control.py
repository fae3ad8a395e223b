"""Before anything else: is it addressed to us, and may this client ask?

Without keys the server is for this machine alone, so a request must be addressed to this machine by
name: a page in a browser here could otherwise reach it under a name of its own (DNS rebinding).
"""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from halfbyte.errors import ServeError
from halfbyte.serve.api.error_responses import error_response
from halfbyte.serve.config import is_loopback
from halfbyte.serve.keys import ApiKeys


class Guard:
    """Lets through what may pass, with the key's name in the request's state."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        open_paths: Collection[str],
        hosts: Collection[str],
    ) -> None:
        """Stand before an app.

        Args:
            app: To be guarded.
            keys: Of those who may ask; none: everybody on this machine.
            open_paths: What everybody may ask.
            hosts: Names, beside those of loopback, under which it may be addressed without keys.
        """
        self._app = app
        self._keys = keys
        self._open = frozenset(open_paths)
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Look at a connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        try:
            name = self._admit(scope["path"], headers)
        except ServeError as error:
            await error_response(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["key"] = name
        await self._app(scope, receive, send)

    def _admit(self, path: str, headers: Headers) -> str:
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
                f"This server has no API keys and answers only to names of this machine, not to "
                f"'{name[:80]}'. Start it with --api-key, or with --allowed-host.",
                status=421,
                code="wrong_host",
            )
