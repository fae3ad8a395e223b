"""Read a request body within its limits, and check it against ``request_schemas.py``."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from halfbyte.errors import ServeError
from halfbyte.serve.api.error_responses import explain
from halfbyte.serve.api.messages import Body
from halfbyte.serve.config import ServeConfig


async def read_body(request: Request, kind: type[Body], config: ServeConfig) -> dict[str, Any]:
    """Read, limit, parse and check.

    Args:
        request: Its body not read yet.
        kind: What the body has to be.
        config: For the limits.

    Returns:
        The body as it was sent, without the fields that are null: those are left out.

    Raises:
        ServeError: 400, 408, 413 or 415: what is wrong, and where.
    """
    # Without this a page in a browser could post here: only JSON makes it ask first.
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise ServeError(
            f"The content type is '{media[:80]}'; it must be application/json.",
            status=415,
            code="unsupported_content_type",
        )
    raw = await _receive(request, config)
    try:
        body = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ServeError(
            f"The body is no JSON: {str(error)[:200]}.", code="invalid_json"
        ) from error
    _check_numbers(body)
    try:
        kind.model_validate(body)
    except ValidationError as error:
        refusal = explain(error, body)
        raise refusal from error
    return {key: value for key, value in body.items() if value is not None}


def _check_numbers(body: Any) -> None:
    """Refuse numbers such as 1e999, which can be read and not passed on, wherever they are."""
    try:
        json.dumps(body, allow_nan=False)
    except ValueError as error:
        raise ServeError(
            "The body holds a number that is too large, such as 1e999. Numbers go up to 1.8e308.",
            code="invalid_json",
        ) from error


async def _receive(request: Request, config: ServeConfig) -> bytes:
    too_large = ServeError(
        f"The body has more than {config.body_bytes} bytes, the most that is taken.",
        status=413,
        code="request_too_large",
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > config.body_bytes:
        raise too_large
    parts = bytearray()
    try:
        async with asyncio.timeout(config.body_seconds):
            goes_on = True
            while goes_on:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ServeError("The client left.", status=499, code="client_disconnected")
                parts += message.get("body", b"")
                if len(parts) > config.body_bytes:
                    raise too_large
                goes_on = message.get("more_body", False)
    except TimeoutError as error:
        raise ServeError(
            f"The body did not arrive within {config.body_seconds:g} s.",
            status=408,
            kind="timeout_error",
            code="request_timeout",
        ) from error
    return bytes(parts)
