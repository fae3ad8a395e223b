"""Where what can be made again is kept."""

from __future__ import annotations

import os
from pathlib import Path

from halfbyte.errors import ConfigError


def cache_folder() -> Path:
    """Give ``halfbyte`` in the user's cache folder; nothing is made.

    Returns:
        The folder.

    Raises:
        ConfigError: The user has no home folder, and none for caches.

    Source:
        XDG Base Directory Specification: an empty or relative ``XDG_CACHE_HOME`` does not count.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", "").strip())
    if not root.is_absolute():
        try:
            root = Path.home() / ".cache"
        except RuntimeError as exc:
            raise ConfigError(
                "There is no folder for caches: this user has no home folder. "
                "Set XDG_CACHE_HOME to a folder that may be written."
            ) from exc
    return root / "halfbyte"
