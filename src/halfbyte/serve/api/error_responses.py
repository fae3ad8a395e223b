"""Errors in OpenAI's format: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from halfbyte.errors import ServeError

MAX_SHOWN_CHARACTERS = 60
"""Length of an invalid value in an error message."""

_CODES = {"missing": "missing_required_parameter"}


def error_body(error: ServeError) -> dict[str, Any]:
    """Format an error as OpenAI does.

    Args:
        error: The error.

    Returns:
        The response body, which is also sent as an event of a stream that has already begun.
    """
    return {
        "error": {
            "message": str(error),
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: ServeError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Make the response for an error.

    Args:
        error: The error.
        headers: Additional response headers.

    Returns:
        The response.
    """
    sent = dict(headers or {})
    if error.retry_after is not None:
        sent["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        sent["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):
        # The rest of the body is not read.
        sent["Connection"] = "close"
    return JSONResponse(error_body(error), status_code=error.status, headers=sent)


def internal_error() -> ServeError:
    """Make an error that reveals no internals; those are in the log."""
    return ServeError(
        "Internal server error. See the server's log for the cause.",
        status=500,
        kind="server_error",
        code="internal_error",
    )


def describe_validation_error(error: ValidationError, body: Any) -> ServeError:
    """Describe which field is invalid, its value and the allowed values.

    Args:
        error: Pydantic's error.
        body: The request body as sent.

    Returns:
        The error to send.
    """
    found = [(_field_path(entry["loc"], body, entry["type"]), entry) for entry in error.errors()]
    # Of a union's alternatives, the one whose error is deepest is the one that was meant.
    path, first = max(found, key=lambda item: len(item[0]))
    same = [entry for other, entry in found if other == path]
    param = ".".join(map(str, path)) or None
    kind = first["type"]
    code = _CODES.get(kind)
    if code is None:
        code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    if kind == "extra_forbidden":
        return unrecognized_argument(str(param))
    if kind == "missing":
        message = f"The required field '{param}' is missing."
    elif param is None:
        message = f"The request is invalid: {_reason(first)}."
    else:
        reasons = "; or: ".join(dict.fromkeys(_reason(entry) for entry in same))
        message = f"'{param}' is {_show(first['input'])}. {reasons}."
    return ServeError(message, code=code, param=param)


def unrecognized_argument(name: str) -> ServeError:
    """Make the error for a field that no schema has."""
    return ServeError(
        f"Unrecognized request argument: '{name[:MAX_SHOWN_CHARACTERS]}'. Remove it.",
        code="unknown_parameter",
        param=name[:MAX_SHOWN_CHARACTERS],
    )


def _reason(entry: Mapping[str, Any]) -> str:
    return str(entry["msg"]).removeprefix("Value error, ")


def _field_path(location: Sequence[Any], body: Any, kind: str) -> tuple[Any, ...]:
    """Remove the tags of union alternatives, which pydantic adds, from a location."""
    path: list[Any] = []
    value = body
    for position, step in enumerate(location):
        is_last = position == len(location) - 1
        if _contains(value, step):
            value = value[step]
        elif not (is_last and kind == "missing"):
            continue
        path.append(step)
    return tuple(path)


def _contains(value: Any, step: Any) -> bool:
    if isinstance(value, dict):
        return step in value
    return isinstance(value, list) and isinstance(step, int) and step < len(value)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "…"
