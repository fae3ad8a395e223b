"""Exceptions raised by halfbyte.

::

    HalfbyteError
    ├── ConfigError            a setting is wrong                     (also ValueError)
    ├── ModelError             the model cannot be streamed or quantized
    ├── CheckpointError        a file is missing, damaged, or of an unsupported dialect
    ├── CalibrationError       the calibration data is insufficient
    ├── DataError              training data cannot be read, or has no tokens to train on
    ├── JournalError           the run to resume had other inputs or options
    ├── VerificationError      the saved checkpoint does not reproduce the results of the run
    ├── StoreError             a version is unknown, damaged, or may not be promoted
    ├── ServeError             a request cannot be served; carries the HTTP status
    ├── KernelUnavailable      no kernel supports the layer, or the forced one does not
    └── MissingExtraError      an optional dependency is not installed (also ImportError)

A message says what was being done to which named thing, what was found and what is allowed, and
what to do. A fallback is never an exception: it is recorded and reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class HalfbyteError(Exception):
    """Base class of the exceptions raised by halfbyte."""


class ConfigError(HalfbyteError, ValueError):
    """A setting is wrong; names it, its value and the allowed values."""


class ModelError(HalfbyteError):
    """The model's structure or files do not support the requested operation."""


class CheckpointError(HalfbyteError):
    """A checkpoint file is missing, damaged, or of an unsupported dialect; names the tensor."""


class CalibrationError(HalfbyteError):
    """The calibration data is insufficient or unusable; names the module or the text."""


class DataError(HalfbyteError):
    """Training data cannot be read or has no tokens to train on; names the file and the line."""


class JournalError(HalfbyteError):
    """The run to resume had other inputs or options; names the difference."""


class VerificationError(HalfbyteError):
    """The saved checkpoint does not reproduce what the run computed; names the module."""


class StoreError(HalfbyteError):
    """A version is unknown, damaged, or may not be changed or promoted as requested; names it."""


class ServeError(HalfbyteError):
    """A request cannot be served; sent to the client as ``{"error": {…}}``, as OpenAI does."""

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
        """Create the error.

        Args:
            message: What was found, what is allowed, what to do.
            status: HTTP status.
            kind: OpenAI's ``type``.
            code: OpenAI's ``code``, such as ``context_length_exceeded``; None if it has none.
            param: The invalid field of the request; None if it is not about a field.
            retry_after: Delay after which a retry may succeed; None if retrying is useless.
                Unit: seconds.
        """
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after = retry_after


class KernelUnavailable(HalfbyteError):
    """No kernel supports this layer, or the forced one does not; gives a reason per kernel."""


class MissingExtraError(HalfbyteError, ImportError):
    """An optional dependency is missing; the message contains the install command."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, without the final period.

    Args:
        error: An exception of another library, to be quoted in a message.

    Returns:
        The line; the name of the exception's type if the message is empty.
    """
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


@contextmanager
def require_extra(module: str, extra: str, purpose: str) -> Iterator[None]:
    """Turn the failed import of an optional dependency into an error with the install command.

    Args:
        module: The Python package imported inside the context.
        extra: The extra of halfbyte that installs it.
        purpose: What needs the package; the message starts with it.

    Yields:
        Nothing.

    Raises:
        MissingExtraError: The package is not installed.
    """
    try:
        yield
    except MissingExtraError:
        # A nested import names its missing dependency more precisely.
        raise
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs the Python package '{module}', which is not installed. "
            f'Install it with: pip install "halfbyte[{extra}]"'
        ) from error
