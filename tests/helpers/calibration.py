"""A tokenizer of one token per character, and calibration data loaded with it."""

from __future__ import annotations

from typing import Any

from halfbyte.quant_config import CalibrationConfig
from halfbyte.quantize.calibration import CalibrationTokens, load_calibration

END = 99


class LetterTokenizer:
    """One token per character."""

    eos_token_id: int | None = END
    chat_template: str | None = None

    def __call__(self, text: str, **keywords: Any) -> dict[str, list[int]]:
        assert keywords["add_special_tokens"] is False
        return {"input_ids": [ord(letter) % 90 for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


TOKENIZER = LetterTokenizer()


def ids_of(text: str) -> list[int]:
    return [ord(letter) % 90 for letter in text]


def load(
    source: Any,
    *,
    tokenizer: Any = TOKENIZER,
    longest: int | None = None,
    **settings: Any,
) -> CalibrationTokens:
    config = CalibrationConfig(**{"samples": 4, "length": 8, **settings})
    return load_calibration(source, config, tokenizer, longest)


def lists(tokens: CalibrationTokens) -> list[list[int]]:
    return [sequence.tolist() for sequence in tokens.sequences]
