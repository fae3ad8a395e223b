"""The version, in one place: the build, `halfbyte --version` and every checkpoint read it here."""

from __future__ import annotations

__version__ = "0.1.0"
