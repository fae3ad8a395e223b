"""Read a request body within its limits, and validate it against ``request_schemas.py``."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from halfbyte.errors import ServeError
from halfbyte.serve.api.error_responses import describe_validation_error, unrecognized_argument
from halfbyte.serve.api.messages import Body
from halfbyte.serve.config import ServeConfig

_HUGE_NUMBER = re.compile(rb"[eE]\+?\d{3}|\d{300}")
"""Occurs in every number that is too large for a float, and seldom elsewhere."""


async def read_body(request: Request, schema: type[Body], config: ServeConfig) -> dict[str, Any]:
    """Read, parse and validate a request's body.

    Args:
        request: The request, its body not read yet.
        schema: The schema of the body.
        config: Contains the limits on size and time.

    Returns:
        The body as it was sent, without fields that are null.

    Raises:
        ServeError: 400, 408, 413 or 415; names the invalid field.
    """
    # Protects against cross-site requests: browsers send JSON only after a CORS preflight.
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
            f"The body is not valid JSON: {str(error)[:200]}.", code="invalid_json"
        ) from error
    if _HUGE_NUMBER.search(raw):
        _check_numbers(body)
    _check_fields(body, schema)
    try:
        schema.model_validate(body)
    except ValidationError as error:
        rejection = describe_validation_error(error, body)
        raise rejection from error
    return {key: value for key, value in body.items() if value is not None}


def _check_fields(body: Any, schema: type[Body]) -> None:
    """Reject an unknown field; pydantic would describe all of them, which may be very many."""
    known = {field.alias or name for name, field in schema.model_fields.items()}
    unknown = [name for name in body if name not in known] if isinstance(body, dict) else []
    if unknown:
        raise unrecognized_argument(str(unknown[0]))


def _check_numbers(body: Any) -> None:
    """Reject numbers such as 1e999, which parse as infinity and cannot be written as JSON again."""
    try:
        json.dumps(body, allow_nan=False)
    except ValueError as error:
        raise ServeError(
            "The body contains a number above 1.8e308, such as 1e999. Use smaller numbers.",
            code="invalid_json",
        ) from error


async def _receive(request: Request, config: ServeConfig) -> bytes:
    too_large = ServeError(
        f"The body has more than {config.max_body_bytes} bytes, the server's maximum.",
        status=413,
        code="request_too_large",
    )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > config.max_body_bytes:
        raise too_large
    parts = bytearray()
    try:
        async with asyncio.timeout(config.body_timeout):
            has_more = True
            while has_more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ServeError(
                        "The client has disconnected.", status=499, code="client_disconnected"
                    )
                parts += message.get("body", b"")
                if len(parts) > config.max_body_bytes:
                    raise too_large
                has_more = message.get("more_body", False)
    except TimeoutError as error:
        raise ServeError(
            f"The body did not arrive within {config.body_timeout:g} s.",
            status=408,
            kind="timeout_error",
            code="request_timeout",
        ) from error
    return bytes(parts)
