"""The README of a converted model: the source's front matter, and what was converted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.front_matter import CARD_FILE, read_front_matter

CARRIED_KEYS = (
    "license", "license_name", "license_link", "language", "base_model", "base_model_relation",
    "pipeline_tag",
)  # fmt: skip
"""Keys of the source's front matter that remain valid after a conversion."""


def write_card(source: Path | None, output: Path, text: str, tag: str) -> None:
    """Write the README of a converted folder.

    Args:
        source: Folder of the source; None if there is none.
        output: The new folder.
        text: Description of the conversion.
        tag: Name of the format, for the Hub's tags.
    """
    from huggingface_hub.repocard_data import CardData

    front: Mapping[str, Any] = read_front_matter(source) if source is not None else {}
    kept = {key: front[key] for key in CARRIED_KEYS if key in front}
    data = CardData(**kept, tags=[tag, "halfbyte"])
    (output / CARD_FILE).write_text(f"---\n{data.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")
