"""Formatting and parsing of durations, sizes and errors for display."""

from __future__ import annotations

import re

from halfbyte.errors import ConfigError

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def format_seconds(seconds: float) -> str:
    """Format a duration: "8.2 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_bytes(size: float) -> str:
    """Format a size in decimal units: "112.7 MB", "6.0 GB"."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def format_error(relative_error: float | None) -> str:
    """Format a relative error with three significant digits."""
    return "none" if relative_error is None else f"{relative_error:.3g}"


def parse_size(text: str, name: str) -> int:
    """Parse a size such as ``4GB`` or ``800 MB``.

    Args:
        text: Number and unit.
        name: Name of the option, for messages.

    Returns:
        The size. Unit: bytes.

    Raises:
        ConfigError: The text is not a number followed by a unit.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKmMgGtT][bB])\s*", text)
    if match is None:
        raise ConfigError(f"{name} is '{text}'; write a number and a unit, such as 4GB or 800MB.")
    return int(float(match[1]) * _UNITS[match[2].lower()])
