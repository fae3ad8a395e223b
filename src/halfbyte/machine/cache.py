"""Where what can be made again is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Give ``halfbyte`` in the user's cache folder; nothing is made.

    Source:
        XDG Base Directory Specification: an empty or relative ``XDG_CACHE_HOME`` does not count.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", "").strip())
    return (root if root.is_absolute() else Path.home() / ".cache") / "halfbyte"
