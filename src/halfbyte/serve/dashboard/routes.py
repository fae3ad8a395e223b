"""The HTTP routes of the dashboard."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

from halfbyte.errors import require_extra

with require_extra("starlette", "serve", "The dashboard"):
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

PAGE, DATA = "/dashboard", "/dashboard/data"
FILES = {
    PAGE: ("page.html", "text/html; charset=utf-8"),
    PAGE + "/": ("page.html", "text/html; charset=utf-8"),
    "/dashboard/page.css": ("page.css", "text/css; charset=utf-8"),
    "/dashboard/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
OPEN_PATHS = tuple(FILES)
"""Need no API key: a browser cannot send one when it opens a page, and they contain no data."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

Snapshot = Callable[[], dict[str, Any]]


def dashboard_routes(snapshot: Snapshot) -> list[Route]:
    """Create the routes; all except ``OPEN_PATHS`` must require an API key.

    Args:
        snapshot: Returns the data to show.

    Returns:
        The routes.
    """
    return [
        *(Route(path, _file(name, kind), methods=["GET"]) for path, (name, kind) in FILES.items()),
        Route(DATA, _data(snapshot), methods=["GET"]),
    ]


def _file(name: str, kind: str) -> Callable[[Request], Response]:
    content = resources.files(__package__).joinpath(name).read_bytes()

    def send(request: Request) -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return send


def _data(snapshot: Snapshot) -> Callable[[Request], Any]:
    # On the event loop, which updates the data; a thread could read a partial update.
    async def send(request: Request) -> Response:
        return JSONResponse(snapshot(), headers={"Cache-Control": "no-store"})

    return send
