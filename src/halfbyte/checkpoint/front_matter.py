"""The front matter of a model card: the YAML at the head of a folder's README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CARD_FILE = "README.md"


def read_front_matter(folder: Path) -> dict[str, Any]:
    """Read the front matter of a folder's model card.

    Args:
        folder: The model's.

    Returns:
        Its values by key; empty where there is none that can be read. People write cards by hand.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        return {}
    # Imported here: it costs half a second, and most commands read no card.
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        return {str(key): value for key, value in (metadata_load(path) or {}).items()}
    except (ValueError, YAMLError):
        return {}
