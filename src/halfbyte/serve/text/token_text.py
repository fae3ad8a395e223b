"""The text and the bytes of one token, as logprobs tell them."""

from __future__ import annotations

import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece writes a space so."""


class Spelling:
    """How a tokenizer spells its tokens."""

    def __init__(self, tokenizer: Any) -> None:
        """Find out how.

        Args:
            tokenizer: The model's.
        """
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}
        self._whole: dict[int, str] = {
            int(token): str(added.content)
            for token, added in tokenizer.added_tokens_decoder.items()
        }
        decoder = str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))
        self._of_character = (
            {character: byte for byte, character in bytes_to_unicode().items()}
            if "ByteLevel" in decoder
            else None
        )

    def spell(self, token: int) -> tuple[str, bytes]:
        """Spell a token.

        Args:
            token: Its id.

        Returns:
            Its text, where bytes that are no character by themselves are escaped as Python does,
            and its bytes.
        """
        if token not in self._known:
            raw = self._find_bytes(token)
            self._known[token] = raw.decode("utf-8", "backslashreplace"), raw
        return self._known[token]

    def _find_bytes(self, token: int) -> bytes:
        if token in self._whole:
            return self._whole[token].encode()
        # Models pad their vocabulary: an id may have no token.
        name = str(self._tokenizer.convert_ids_to_tokens(token) or "")
        if self._of_character is not None:
            if all(character in self._of_character for character in name):
                return bytes(self._of_character[character] for character in name)
            return name.encode()
        if match := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(match[1], 16)])
        return name.replace(_WORD_START, " ").encode()
