"""Refusals in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from halfbyte.errors import ServeError

MOST_SHOWN = 60
"""Characters of a wrong value that a message repeats."""

_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}


def error_body(error: ServeError) -> dict[str, Any]:
    """Write an error as OpenAI's clients read it.

    Args:
        error: Any.

    Returns:
        The body; the same goes into a stream that has begun.
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
    """Answer with an error.

    Args:
        error: Any.
        headers: To send along.

    Returns:
        The answer.
    """
    sent = dict(headers or {})
    if error.retry_after is not None:
        sent["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        sent["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):
        # The rest of the body is not waited for.
        sent["Connection"] = "close"
    return JSONResponse(error_body(error), status_code=error.status, headers=sent)


def internal_error() -> ServeError:
    """Build the error that tells nothing of what happened inside; the log does."""
    return ServeError(
        "The server failed at this request. Its log says why.",
        status=500,
        kind="server_error",
        code="internal_error",
    )


def explain(error: ValidationError, body: Any) -> ServeError:
    """Say which field is wrong, what it holds and what it may hold.

    Args:
        error: Of a body.
        body: As it was sent.

    Returns:
        The refusal.
    """
    found = [(_real_path(entry["loc"], body, entry["type"]), entry) for entry in error.errors()]
    # Of the alternatives of a field, the one that got deepest is the one that was meant.
    path, first = max(found, key=lambda item: len(item[0]))
    same = [entry for other, entry in found if other == path]
    param = ".".join(map(str, path)) or None
    kind = first["type"]
    code = _CODES.get(kind)
    if code is None:
        code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    if kind == "extra_forbidden":
        message = f"Unrecognized request argument: '{param}'. Leave it out."
    elif kind == "missing":
        message = f"'{param}' is missing; it is required."
    elif param is None:
        message = f"The request is wrong: {_reason(first)}."
    else:
        reasons = "; or: ".join(dict.fromkeys(_reason(entry) for entry in same))
        message = f"'{param}' is {_show(first['input'])}. {reasons}."
    return ServeError(message, code=code, param=param)


def _reason(entry: Mapping[str, Any]) -> str:
    return str(entry["msg"]).removeprefix("Value error, ")


def _real_path(location: Sequence[Any], body: Any, kind: str) -> tuple[Any, ...]:
    """Leave out of a location what pydantic adds: the names of a union's alternatives."""
    path: list[Any] = []
    here = body
    for place, step in enumerate(location):
        last = place == len(location) - 1
        if _has(here, step):
            here = here[step]
        elif not (last and kind == "missing"):
            continue
        path.append(step)
    return tuple(path)


def _has(here: Any, step: Any) -> bool:
    if isinstance(here, dict):
        return step in here
    return isinstance(here, list) and isinstance(step, int) and step < len(here)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "…"
