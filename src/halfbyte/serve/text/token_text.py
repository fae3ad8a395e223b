"""The text and bytes of single tokens, for logprobs."""

from __future__ import annotations

import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's replacement of a space."""


class Spelling:
    """Texts and bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        """Inspect a tokenizer.

        Args:
            tokenizer: The model's tokenizer.
        """
        self._tokenizer = tokenizer
        self._cache: dict[int, tuple[str, bytes]] = {}
        self._added_tokens: dict[int, str] = {
            int(token): str(added.content)
            for token, added in tokenizer.added_tokens_decoder.items()
        }
        decoder = str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))
        # Byte of each character of byte-level tokenizers; None for others.
        self._character_bytes = (
            {character: byte for byte, character in bytes_to_unicode().items()}
            if "ByteLevel" in decoder
            else None
        )

    def spell(self, token: int) -> tuple[str, bytes]:
        """Return a token's text and bytes.

        Args:
            token: The token's id.

        Returns:
            The text, with incomplete UTF-8 sequences escaped as in Python, and the bytes.
        """
        if token not in self._cache:
            raw = self._find_bytes(token)
            self._cache[token] = raw.decode("utf-8", "backslashreplace"), raw
        return self._cache[token]

    def _find_bytes(self, token: int) -> bytes:
        if token in self._added_tokens:
            return self._added_tokens[token].encode()
        # Models pad their vocabulary, so an id may have no token.
        name = str(self._tokenizer.convert_ids_to_tokens(token) or "")
        if self._character_bytes is not None:
            if all(character in self._character_bytes for character in name):
                return bytes(self._character_bytes[character] for character in name)
            return name.encode()
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(match[1], 16)])
        return name.replace(_WORD_START, " ").encode()
