"""Every exception that halfbyte raises on purpose.

::

    HalfbyteError
    ├── ConfigError            a setting is wrong                     (also ValueError)
    ├── ModelError             the model is one that cannot be streamed or quantized
    ├── CheckpointError        a file is missing, damaged, or of another dialect
    ├── CalibrationError       the data cannot support the maths
    ├── DataError              training data cannot be read, or teaches nothing
    ├── JournalError           the work to resume belongs to another run
    ├── VerificationError      what was written does not compute what was measured
    ├── StoreError             a version is unknown, damaged, or not to be promoted
    ├── ServeError             a request cannot be served; carries the HTTP status
    ├── KernelUnavailable      no kernel fits, or the forced one does not
    └── MissingExtraError      an optional part of halfbyte is not installed (also ImportError)

A message says what was being done to which named thing, what was found against what is allowed,
and what to do. A fallback is never an exception: it is recorded and reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class HalfbyteError(Exception):
    """Base of all errors that halfbyte raises on purpose."""


class ConfigError(HalfbyteError, ValueError):
    """A setting is wrong; the message names it, its value and what is allowed."""


class ModelError(HalfbyteError):
    """The model's structure or files do not allow what was asked."""


class CheckpointError(HalfbyteError):
    """A checkpoint file is missing, damaged, or of a dialect that is not read; names the tensor."""


class CalibrationError(HalfbyteError):
    """The calibration data cannot support the maths; names the module or the text."""


class DataError(HalfbyteError):
    """Training data cannot be read, or teaches nothing; names the file and the line."""


class JournalError(HalfbyteError):
    """An unfinished run does not belong to these inputs or options; names the difference."""


class VerificationError(HalfbyteError):
    """The saved checkpoint does not compute what the run computed in memory; names the module."""


class StoreError(HalfbyteError):
    """A store of versions is damaged, or does not hold or allow what was asked; names it."""


class ServeError(HalfbyteError):
    """A request cannot be served: what OpenAI's clients get as ``{"error": {…}}``."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """Keep what the client is told.

        Args:
            message: What was found, what is allowed, what to do.
            status: HTTP status.
            kind: OpenAI's ``type``.
            code: OpenAI's ``code``, such as ``context_length_exceeded``; None where there is none.
            param: The request's field at fault; None where there is none.
            retry_after: Seconds after which it may work; None where it never will.
        """
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after = retry_after


class KernelUnavailable(HalfbyteError):
    """No kernel can run this layer, or the one that was forced cannot; one reason per kernel."""


class MissingExtraError(HalfbyteError, ImportError):
    """An optional dependency is missing; the message holds the exact install command."""


def first_line(error: BaseException) -> str:
    """Give the first line of an error's message, without its full stop.

    Args:
        error: Somebody else's, to be told within a message of ours.

    Returns:
        The line; the error's type where it has none.
    """
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


@contextmanager
def require_extra(module: str, extra: str, purpose: str) -> Iterator[None]:
    """Say how to install an optional dependency, where importing it fails.

    Args:
        module: The Python package that is imported within.
        extra: The extra of halfbyte that brings it.
        purpose: What it is needed for, for the start of the message.

    Yields:
        Nothing.

    Raises:
        MissingExtraError: It is not installed; the message has the install command.
    """
    try:
        yield
    except MissingExtraError:
        # What is imported within says more exactly what it lacks.
        raise
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs the Python package '{module}', which is not installed. "
            f'Install it with: pip install "halfbyte[{extra}]"'
        ) from error
