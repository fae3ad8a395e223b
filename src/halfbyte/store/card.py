"""A version's model card: its front matter says which model it is a quantization of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from halfbyte.store.manifest import CARD_FILE, BaseModel

RELATION = "quantized"
_FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def make_card(folder: Path, base: BaseModel) -> bytes | None:
    """Complete a folder's model card for the Hugging Face Hub.

    Args:
        folder: The model.
        base: What was quantized.

    Returns:
        The card with ``base_model`` and ``base_model_relation``; None where the folder's own has
        both already, or where the base is not known.
    """
    if base.id is None:
        return None
    from huggingface_hub.repocard import metadata_load

    path = folder / CARD_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    try:
        front: dict[str, Any] = (metadata_load(path) or {}) if text else {}
    except ValueError:
        front = {}
    wanted = {"base_model": base.id, "base_model_relation": RELATION}
    if {key: front.get(key) for key in wanted} == wanted:
        return None
    from huggingface_hub.repocard_data import CardData

    merged = CardData(**{**front, **wanted}).to_yaml()
    body = _FRONT.sub("", text) or f"# {folder.name}\n"
    return f"---\n{merged}\n---\n{body}".encode()
