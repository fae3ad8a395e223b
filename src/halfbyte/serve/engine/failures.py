"""What a request is told that was begun and could not be finished."""

from __future__ import annotations

from halfbyte.errors import ServeError
from halfbyte.serve.engine.contract import TokenRequest
from halfbyte.serve.engine.job import Job


def late(request: TokenRequest) -> ServeError:
    """Build the error of a request whose deadline came first."""
    return ServeError(
        f"The answer to {len(request.prompt)} tokens was not ready in time. Ask for fewer tokens, "
        "or allow more time.",
        status=408,
        kind="timeout_error",
        code="deadline_exceeded",
    )


def not_finite(job: Job) -> ServeError:
    """Build the error of a request after which the model gave no numbers."""
    return ServeError(
        f"The model gave no numbers after {len(job.tokens)} tokens: its weights or this input "
        "overflow.",
        status=500,
        kind="server_error",
        code="not_finite",
    )


def engine_failed(reason: str, *, status: int = 503) -> ServeError:
    """Build the error of a request that the engine could not go on with."""
    return ServeError(
        f"The engine failed with this request: {reason}. The log says more.",
        status=status,
        kind="server_error",
        code="engine_failed",
    )
