"""Errors of requests that were accepted but could not be completed."""

from __future__ import annotations

from halfbyte.errors import ServeError
from halfbyte.serve.engine.contract import TokenRequest
from halfbyte.serve.engine.job import Job


def deadline_error(request: TokenRequest) -> ServeError:
    """Make the error of a request that has exceeded its deadline."""
    return ServeError(
        f"The answer to a prompt of {len(request.prompt)} tokens was not complete before its "
        "deadline. Request fewer tokens or allow more time.",
        status=408,
        kind="timeout_error",
        code="deadline_exceeded",
    )


def non_finite_error(job: Job) -> ServeError:
    """Make the error of a request for which the model computed non-finite logits."""
    return ServeError(
        f"The model computed non-finite logits after {len(job.tokens)} tokens: its weights or this "
        "input cause an overflow.",
        status=500,
        kind="server_error",
        code="not_finite",
    )


def engine_error(reason: str, *, status: int = 503) -> ServeError:
    """Make the error of a request that the engine could not continue."""
    return ServeError(
        f"The engine failed on this request: {reason}. See the server's log.",
        status=status,
        kind="server_error",
        code="engine_failed",
    )
