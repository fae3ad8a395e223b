"""The front matter of a model card: the YAML header of a folder's README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CARD_FILE = "README.md"


def read_front_matter(folder: Path) -> dict[str, Any]:
    """Read the front matter of a folder's model card.

    Args:
        folder: The model folder.

    Returns:
        Its values by key; empty if there is none or it is not valid YAML, as cards are written by
        hand.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        return {}
    # Imported here because it takes half a second, and most commands read no card.
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        return {str(key): value for key, value in (metadata_load(path) or {}).items()}
    except (ValueError, YAMLError):
        return {}
