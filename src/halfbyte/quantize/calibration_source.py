"""Calibration data as it is given -> token ids: files, JSON lines, texts, chats, tables of ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.errors import CalibrationError
from halfbyte.json_lines import read_json_lines

CalibrationSource = str | Path | Sequence[Any] | None
"""None: the built-in text. "self": text that the model writes. A path: a text file, or JSON lines.
A sequence: texts, chat message lists, token id lists, or what a tokenizer returns; of a padded
table of ids the padding is left out by its attention mask. Beside ids there may be labels."""

IGNORED = -100
"""Label of a token that does not count, as in torch's cross entropy."""

LETTERS_PER_TOKEN = 8
"""More than most text has."""
LAST_TOKENS = 64
"""At the end of a part of a text, what tokens there are may hang on what follows."""

_KEYS = "'text', 'messages' or 'input_ids'"
_WHOLE_NUMBERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)


@dataclass(frozen=True, slots=True)
class CalibrationRow:
    """A sequence, and which of its tokens have a label; None: it has no labels."""

    ids: Tensor
    counted: Tensor | None = None

    def head(self, length: int) -> CalibrationRow:
        """Its first tokens."""
        mask = self.counted
        return CalibrationRow(self.ids[:length], None if mask is None else mask[:length])


def read_source(source: str | Path | Sequence[Any]) -> tuple[str, list[Any]]:
    """Read what calibration data was given.

    Args:
        source: See :data:`CalibrationSource`; not None.

    Returns:
        Its name, and its items: texts, chats, ids, or objects that hold one of them.

    Raises:
        CalibrationError: It cannot be read, or is empty.
    """
    if not isinstance(source, str | Path):
        # What a tokenizer returns is one item, not a list of its keys.
        whole = isinstance(source, Mapping | Tensor) or not isinstance(source, Iterable)
        items = [source] if whole else list(source)
        if not items:
            raise CalibrationError("The calibration list is empty. Give at least one text.")
        return "a list given in Python", items
    path = Path(source)
    ending = path.suffix.lower()
    if ending in (".json", ".jsonl"):
        return path.name, _read_objects(path)
    if "json" in ending:
        raise CalibrationError(
            f"Calibration file {path} ends in {path.suffix}: name a file of JSON lines .jsonl, one "
            "list of objects .json, and plain text .txt."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"Cannot read calibration file {path}: {error}. Give a UTF-8 text file, or JSON lines "
            f"with {_KEYS}."
        ) from error
    if not text.strip():
        raise CalibrationError(f"Calibration file {path} is empty. Give a text of some pages.")
    return path.name, [text]


def _read_objects(path: Path) -> list[Any]:
    wanted = f"Give one object per line, with {_KEYS}."
    lines = read_json_lines(path, CalibrationError, what="calibration file", wanted=wanted)
    for line in lines:
        if all(line.values.get(key) is None for key in ("text", "messages", "input_ids")):
            raise CalibrationError(f'{line.where} has none of {_KEYS}. Example: {{"text": "..."}}')
    return [line.values for line in lines]


def as_ids(name: str, item: Any) -> list[CalibrationRow] | None:
    """Take an item's token ids, row by row, without padding.

    Args:
        name: Of the data, for messages.
        item: One of :func:`read_source`.

    Returns:
        The rows; None where the item is text.
    """
    beside: dict[str, Any] = {}
    if isinstance(item, Mapping):
        if item.get("input_ids") is None:
            return None
        beside = {key: item.get(key) for key in ("attention_mask", "labels")}
        item = item["input_ids"]
    elif not _is_numbers(item):
        return None
    rows = _as_rows(name, item)
    masks = _as_rows_beside(name, rows, beside.get("attention_mask"), "an attention mask")
    labels = _as_rows_beside(name, rows, beside.get("labels"), "labels")
    counted = [None] * len(rows) if labels is None else [row != IGNORED for row in labels]
    if masks is None:
        return [CalibrationRow(ids, mask) for ids, mask in zip(rows, counted, strict=True)]
    return [
        CalibrationRow(ids[kept != 0], None if mask is None else mask[kept != 0])
        for ids, mask, kept in zip(rows, counted, masks, strict=True)
    ]


def _as_rows_beside(
    name: str, rows: Sequence[Tensor], values: Any, what: str
) -> list[Tensor] | None:
    """Read what stands beside token ids, one entry for each."""
    if values is None:
        return None
    found = _as_rows(name, values)
    if [len(row) for row in rows] != [len(row) for row in found]:
        raise CalibrationError(
            f"Calibration data {name} holds {sum(map(len, rows))} token ids with {what} "
            f"of {sum(map(len, found))}. Give one entry per id."
        )
    return found


def _is_numbers(item: Any) -> bool:
    if isinstance(item, list | tuple):
        return not item or isinstance(item[0], int | float) or _is_numbers(item[0])
    return isinstance(item, Tensor | np.ndarray)


def _as_rows(name: str, ids: Any) -> list[Tensor]:
    """Whole numbers as int64 rows, from one row or a (ragged) table of them."""
    is_table = (
        not isinstance(ids[0], int | float)
        if isinstance(ids, list | tuple) and ids
        else (getattr(ids, "ndim", 1) == 2)
    )
    try:
        rows = [torch.as_tensor(row).cpu() for row in (ids if is_table else [ids])]
    except (TypeError, ValueError, RuntimeError):
        rows = []
    whole = all(row.dim() == 1 and (not len(row) or row.dtype in _WHOLE_NUMBERS) for row in rows)
    if not rows or not whole:
        raise CalibrationError(
            f"Calibration data {name} holds {str(ids)[:40]!r}, which are no token ids. Give lists "
            "of whole numbers, such as [1, 42, 7]."
        )
    return [row.to(torch.int64) for row in rows]


def tokenize(
    name: str, items: Iterable[Any], tokenizer: Any | None, enough: int | None = None
) -> Tensor:
    """Join texts and chats, by the end-of-text token, and tokenise them.

    Args:
        name: Of the data, for messages.
        items: Of :func:`read_source`.
        tokenizer: The model's; None where it has none.
        enough: So many tokens are wanted from the start; None: all.

    Returns:
        int64 [tokens], at least ``enough`` where there are.

    Raises:
        CalibrationError: An item is neither, or the tokenizer or its chat template is missing.
    """
    if tokenizer is None:
        raise CalibrationError(
            f"Calibration data {name} is text, and the model folder has no tokenizer. "
            "Add the tokenizer's files, or give lists of token ids."
        )
    parts: list[Tensor] = []
    count = 0
    for item in items:
        text = _as_text(name, item, tokenizer)
        if count and tokenizer.eos_token_id is not None:
            parts.append(torch.tensor([tokenizer.eos_token_id]))
            count += 1
        parts.append(_encode(text, tokenizer, None if enough is None else enough - count))
        count += len(parts[-1])
        if enough is not None and count >= enough:
            break
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _encode(text: str, tokenizer: Any, enough: int | None) -> Tensor:
    """Tokenise a text, or of a long one as many lines as hold enough tokens."""
    characters = len(text) if enough is None else LETTERS_PER_TOKEN * (enough + LAST_TOKENS)
    while True:
        end = text.rfind("\n", 0, characters) + 1 if characters < len(text) else 0
        head = text[: end or characters]
        found = tokenizer(head, add_special_tokens=False, verbose=False)["input_ids"]
        if len(head) == len(text) or len(found) >= (enough or 0) + LAST_TOKENS:
            return torch.tensor(found, dtype=torch.int64)
        characters *= 2


def _as_text(name: str, item: Any, tokenizer: Any) -> str:
    messages = item.get("messages") if isinstance(item, Mapping) else item
    if isinstance(item, Mapping) and item.get("text") is not None:
        messages = item["text"]
    if isinstance(messages, str):
        return messages
    is_chat = isinstance(messages, Sequence) and all(isinstance(m, Mapping) for m in messages)
    if not is_chat or not messages:
        raise CalibrationError(
            f"Calibration data {name} holds an item of type {type(item).__name__} that is "
            "neither text, nor chat messages, nor token ids."
        )
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"Calibration data {name} holds chat messages, and the tokenizer has no chat template. "
            "Give plain text."
        )
    return str(tokenizer.apply_chat_template(messages, tokenize=False))
