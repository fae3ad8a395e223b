"""The ASGI application: all routes and their handlers."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from halfbyte.errors import ServeError, require_extra
from halfbyte.version import __version__

with require_extra("fastapi", "serve", "halfbyte serve"):
    from fastapi import FastAPI, Request, Response
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, PlainTextResponse
    from starlette.types import ASGIApp, Receive, Scope, Send

from halfbyte.serve.api.access_control import AccessControl
from halfbyte.serve.api.error_responses import error_response, internal_error
from halfbyte.serve.api.gateway import Gateway
from halfbyte.serve.api.request_body import read_body
from halfbyte.serve.api.request_schemas import (
    AdapterRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health", "/ready")
"""Paths for load balancers, which have no API key; they reveal nothing but the status."""
PROMETHEUS_TEXT = "text/plain; version=1.0.0; charset=utf-8"

Handler = Callable[[Request], Awaitable[ASGIApp]]


def build_app(gateway: Gateway) -> ASGIApp:
    """Build the application.

    Args:
        gateway: The gateway that answers the requests.

    Returns:
        The ASGI application, without FastAPI's documentation pages.
    """
    app = FastAPI(
        title="halfbyte",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        # On a redirect from /v1/models/, clients would drop their API key.
        redirect_slashes=False,
    )
    handlers: dict[tuple[str, str], Handler] = {
        **_model_handlers(gateway),
        **_answer_handlers(gateway),
        **_state_handlers(gateway),
    }
    if gateway.adapters is not None and gateway.keys:
        handlers |= _adapter_handlers(gateway)
    # Plain Starlette routes: read_body validates the bodies.
    for (method, path), handler in handlers.items():
        # Starlette calls whatever the handler returns; it need not be a Response.
        app.add_route(path, handler, methods=[method])  # type: ignore[arg-type]
    app.router.routes.extend(gateway.routes)
    app.add_exception_handler(ServeError, _handle_serve_error)
    app.add_exception_handler(HTTPException, _handle_http_exception)
    app.add_exception_handler(Exception, _handle_unexpected_error)
    return AccessControl(
        _DirectDispatch(app, handlers),
        keys=gateway.keys,
        open_paths=(*OPEN_PATHS, *gateway.open_paths),
        hosts=(gateway.config.host, *gateway.config.allowed_hosts),
    )


class _DirectDispatch:
    """Calls the handler of an exact path directly; passes all other requests to the app.

    The app would find the same handlers, but its middleware adds a tenth of a millisecond to each
    request and to each piece of a stream.
    """

    def __init__(self, app: ASGIApp, handlers: Mapping[tuple[str, str], Handler]) -> None:
        self._app = app
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._handlers.get((scope.get("method", ""), scope.get("path", "")))
        if handler is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await handler(request)
        except ServeError as error:
            response = await _handle_serve_error(request, error)
        except Exception as error:
            logger.exception("%s %s failed.", request.method, request.url.path)
            response = await _handle_unexpected_error(request, error)
        await response(scope, receive, send)


def _answer_handlers(gateway: Gateway) -> dict[tuple[str, str], Handler]:
    config = gateway.config

    async def chat(request: Request) -> ASGIApp:
        body = await read_body(request, ChatRequest, config)
        return await gateway.answer(request, "chat", body)

    async def complete(request: Request) -> ASGIApp:
        body = await read_body(request, CompletionRequest, config)
        return await gateway.answer(request, "completion", body)

    async def tokenize(request: Request) -> Response:
        body = await read_body(request, TokenizeRequest, config)
        return JSONResponse(await _require(gateway.text_tools, "/tokenize").tokenize(body))

    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeRequest, config)
        return JSONResponse(await _require(gateway.text_tools, "/detokenize").detokenize(body))

    return {
        ("POST", "/v1/chat/completions"): chat,
        ("POST", "/v1/completions"): complete,
        ("POST", "/tokenize"): tokenize,
        ("POST", "/detokenize"): detokenize,
    }


def _model_handlers(gateway: Gateway) -> dict[tuple[str, str], Handler]:
    def describe(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": gateway.started,
            "owned_by": "halfbyte",
        }

    async def models(request: Request) -> Response:
        entries = [describe(name) for name in gateway.models]
        return JSONResponse({"object": "list", "data": entries})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in gateway.models:
            raise ServeError(
                f"The model '{name[:80]}' does not exist on this server. GET /v1/models lists "
                "those that do.",
                status=404,
                code="model_not_found",
                param="model",
            )
        return JSONResponse(describe(name))

    # A model's name may contain a slash, as on the Hugging Face Hub.
    return {("GET", "/v1/models"): models, ("GET", "/v1/models/{name:path}"): model}


def _state_handlers(gateway: Gateway) -> dict[tuple[str, str], Handler]:
    async def health(request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(request: Request) -> Response:
        is_ready = await gateway.is_ready()
        status = "ready" if is_ready else "not ready"
        return JSONResponse({"status": status}, status_code=200 if is_ready else 503)

    async def version(request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def metrics(request: Request) -> Response:
        text = _require(gateway.metrics, "/metrics")()
        return PlainTextResponse(text, media_type=PROMETHEUS_TEXT)

    return {
        ("GET", "/health"): health,
        ("GET", "/ready"): ready,
        ("GET", "/version"): version,
        ("GET", "/metrics"): metrics,
    }


def _adapter_handlers(gateway: Gateway) -> dict[tuple[str, str], Handler]:
    config, control = gateway.config, gateway.adapters
    assert control is not None

    async def load(request: Request) -> Response:
        body = await read_body(request, AdapterRequest, config)
        await control.load(body["lora_name"])
        return JSONResponse({"status": "loaded", "id": body["lora_name"]})

    async def unload(request: Request) -> Response:
        body = await read_body(request, AdapterRequest, config)
        await control.unload(body["lora_name"])
        return JSONResponse({"status": "unloaded", "id": body["lora_name"]})

    return {
        ("POST", "/v1/load_lora_adapter"): load,
        ("POST", "/v1/unload_lora_adapter"): unload,
    }


def _require(provider: Any, path: str) -> Any:
    if provider is None:
        raise ServeError(
            f"{path} is not available because the model does not run in this process.",
            status=404,
            code="not_supported",
        )
    return provider


async def _handle_serve_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    # Clients that retry while the server drains would fill the log.
    if error.status >= 500 and error.code != "shutting_down":
        logger.warning("%s %s: %s", request.method, request.url.path, error)
    # With it a failure is found in the request log.
    request_id = getattr(request.state, "request_id", None)
    return error_response(error, {"X-Request-Id": request_id} if request_id else None)


async def _handle_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    message = f"This server has no {request.method} {request.url.path[:200]}."
    response = ServeError(message, status=error.status_code, code=code)
    return error_response(response, error.headers)


async def _handle_unexpected_error(request: Request, error: Exception) -> Response:
    return error_response(internal_error())
