"""The folder for files that can be recreated."""

from __future__ import annotations

import os
from pathlib import Path

from halfbyte.errors import ConfigError


def cache_folder() -> Path:
    """Return halfbyte's folder in the user's cache folder, without creating it.

    Returns:
        The folder.

    Raises:
        ConfigError: The user has neither a home folder nor a cache folder.

    Source:
        XDG Base Directory Specification: an empty or relative ``XDG_CACHE_HOME`` is ignored.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", "").strip())
    if not root.is_absolute():
        try:
            root = Path.home() / ".cache"
        except RuntimeError as exc:
            raise ConfigError(
                "Cannot find a cache folder: this user has no home folder. "
                "Set XDG_CACHE_HOME to a writable folder."
            ) from exc
    return root / "halfbyte"
