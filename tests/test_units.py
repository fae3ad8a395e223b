from __future__ import annotations

import pytest

from halfbyte.errors import ConfigError
from halfbyte.units import format_bytes, format_error, format_seconds, parse_size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (8.24, "8.2 s"), (59.9, "59.9 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (112_700_000, "112.7 MB"), (6e12, "6000.0 GB")],
)
def test_bytes(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(("error", "text"), [(None, "none"), (0.012345, "0.0123"), (0.0, "0")])
def test_error(error, text):
    assert format_error(error) == text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("800MB", 8 * 10**8),
        ("1.5 gb", 15 * 10**8),
        (" 12 kB ", 12_000),
        ("2TB", 2 * 10**12),
    ],
)
def test_size_is_read(text, size):
    assert parse_size(text, "memory") == size


@pytest.mark.parametrize("text", ["", "lots", "4", "4G", "-1GB", "1,5GB", "4GiB", "GB", "4GB 2MB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ConfigError, match=rf"memory is '{text}'; write a number and a unit"):
        parse_size(text, "memory")
