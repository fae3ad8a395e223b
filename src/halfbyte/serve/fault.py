"""Who is to blame for an answer that did not come: told in one place, for everybody who asks.

The breaker counts what is the model's own fault, fallback asks another model for what one of them
can mend, and a candidate is judged by what it, and not its client, did wrong.
"""

from __future__ import annotations

from enum import Enum

from halfbyte.errors import ServeError


class Blame(Enum):
    """Whose fault it is."""

    OURS = "ours"
    """The model's: it failed, or was late."""
    LOAD = "load"
    """Nobody's: the model has too much to do, and another one may have less."""
    REQUEST = "request"
    """It asks for what the model cannot do."""
    CLIENT = "client"
    """It did not wait, or allowed too little time."""


def find_blame(error: ServeError) -> tuple[str, Blame]:
    """Tell why an answer did not come.

    Args:
        error: Of the model that was asked.

    Returns:
        A word for the cause, and whose fault it is.
    """
    if error.status == 408:
        return "deadline", Blame.CLIENT
    if error.status == 429:
        return "overload", Blame.LOAD
    if error.status == 504:
        return "timeout", Blame.OURS
    return ("error", Blame.OURS) if error.status >= 500 else ("refused", Blame.REQUEST)
