"""Model card of a version, whose front matter names the base model."""

from __future__ import annotations

import re
from pathlib import Path

from halfbyte.checkpoint.front_matter import CARD_FILE, read_front_matter
from halfbyte.store.manifest import BaseModel

RELATION = "quantized"
_FRONT = re.compile(rb"\A(\xef\xbb\xbf)?\s*---\r?\n.*?\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)


def make_card(folder: Path, base: BaseModel) -> bytes | None:
    """Complete a folder's model card for the Hugging Face Hub.

    Args:
        folder: The model.
        base: The model that was quantized.

    Returns:
        The card with ``base_model`` and ``base_model_relation``; None if the folder's card has
        both, or if the base is unknown.
    """
    if base.id is None:
        return None
    path = folder / CARD_FILE
    content = path.read_bytes() if path.is_file() else b""
    front = read_front_matter(folder)
    # The card of a merged model may name several bases.
    bases = front.get("base_model")
    is_among = isinstance(bases, list) and base.id in bases
    wanted = {"base_model": bases if is_among else base.id, "base_model_relation": RELATION}
    if {key: front.get(key) for key in wanted} == wanted:
        return None
    from huggingface_hub.repocard_data import CardData

    merged = CardData(**{**front, **wanted}).to_yaml()
    # Front matter that cannot be parsed stays in the text, so that nothing is lost.
    body = _FRONT.sub(b"", content) if front else content
    return f"---\n{merged}\n---\n".encode() + (body or f"# {folder.name}\n".encode())
