"""Classifies errors by whose fault they are.

The circuit breaker counts only faults of the model, fallback asks another model where that may
help, and a canary's candidate is not judged by what its clients did wrong.
"""

from __future__ import annotations

from enum import Enum

from halfbyte.errors import ServeError


class Fault(Enum):
    """Whose fault it is that a request was not answered."""

    MODEL = "model"
    """The model failed or timed out."""
    LOAD = "load"
    """The model is overloaded; another one may not be."""
    REQUEST = "request"
    """The request asks for something that the model cannot do."""
    CLIENT = "client"
    """The client disconnected, or set too short a deadline."""


def classify_error(error: ServeError) -> tuple[str, Fault]:
    """Classify the error of a model.

    Args:
        error: What the model raised.

    Returns:
        The cause, as in metrics and logs, and whose fault it is.
    """
    if error.status == 408:
        return "deadline", Fault.CLIENT
    if error.status == 429:
        return "overload", Fault.LOAD
    if error.status == 504:
        return "timeout", Fault.MODEL
    return ("error", Fault.MODEL) if error.status >= 500 else ("refused", Fault.REQUEST)
