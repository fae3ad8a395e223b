"""Text -> token sequences -> batches of one length each. Nothing is padded.

A text is tokenised whole, without special tokens, and cut into sequences of equal length; several
texts are joined by the end-of-text token first. Sequences of token ids are taken as they are. The
built-in text is of five kinds, of which each sequence holds one and any stretch of them a mix.
Batches hold sequences of one length only, so no padding can enter a Hessian.

Token ids may come with labels, as Transformers and PEFT train on them: then it is the labelled
tokens whose predictions count where a whole model is trained (end_to_end.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.data import CALIBRATION_FILES, PROSE, calibration_documents
from halfbyte.errors import CalibrationError
from halfbyte.quant_config import CalibrationConfig

BUILT_IN = "built-in (prose, code, dialogue, languages, technical)"
SHARE_OF_PROSE = 0.4
"""Of the built-in sequences, where there are enough; the other kinds share the rest evenly."""
FEWEST_TOKENS = 2
_WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

CalibrationSource = str | Path | Sequence[Any] | None
"""None: the built-in text. "self": text that the model writes. A path: a text file, or JSON lines.
A sequence: texts, chat message lists, token id lists, or what a tokenizer returns; of a padded
table of ids the padding is left out by its attention mask. Beside ids there may be labels."""

IGNORED = -100
"""Label of a token that does not count, as in torch's cross entropy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationTokens:
    """Token sequences to calibrate on."""

    sequences: tuple[Tensor, ...]
    """int64 [tokens] each."""
    source: str
    notes: tuple[str, ...] = ()
    counted: tuple[Tensor | None, ...] = ()
    """bool [tokens] each, of the tokens that have a label; None: the sequence has none. Empty
    where no sequence has."""

    @property
    def num_tokens(self) -> int:
        """Tokens in all sequences."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def digest(self) -> str:
        """SHA-256 over lengths and ids: the same digest is the same calibration."""
        digest = hashlib.sha256()
        for sequence in self.sequences:
            digest.update(len(sequence).to_bytes(8, "little"))
            digest.update(sequence.numpy().astype("<i8").tobytes())
        for mask in self.counted:
            digest.update(b"-" if mask is None else mask.numpy().tobytes())
        return digest.hexdigest()

    def batches(self, batch_size: int) -> list[Tensor]:
        """Stack sequences of equal length.

        Args:
            batch_size: Sequences per batch, at most.

        Returns:
            int64 [sequences, tokens] each; lengths in order of first appearance.
        """
        return _stack_equal(self.sequences, batch_size)

    def weight_batches(self, batch_size: int) -> list[Tensor] | None:
        """Say how much the prediction behind each token counts, batch by batch.

        Where a sequence has labels, the predictions of its labelled tokens count alike and the
        others not at all. All tokens of all sequences without labels together count as much as
        all labelled ones together: neither drowns the other.

        Args:
            batch_size: As for :meth:`batches`.

        Returns:
            fp32 [sequences, tokens] each; None where no sequence has labels, so all count alike.
        """
        if not self.counted:
            return None
        # The prediction of a token is made at the one before it.
        masks = [None if m is None else m.roll(-1).float() for m in self.counted]
        for mask in masks:
            if mask is not None:
                mask[-1] = 0.0
        labelled = sum(float(mask.sum()) for mask in masks if mask is not None)
        pairs = list(zip(self.sequences, masks, strict=True))
        plain = sum(len(ids) for ids, mask in pairs if mask is None)
        share = labelled / max(plain, 1)
        weights = [torch.full((len(i),), share) if m is None else m for i, m in pairs]
        return _stack_equal(weights, batch_size)


@dataclass(frozen=True, slots=True)
class _Row:
    """A sequence, and which of its tokens have a label; None: it has no labels."""

    ids: Tensor
    counted: Tensor | None = None

    def head(self, length: int) -> _Row:
        """Its first tokens."""
        mask = self.counted
        return _Row(self.ids[:length], None if mask is None else mask[:length])


def load_calibration(
    source: CalibrationSource, config: CalibrationConfig, tokenizer: Any | None, longest: int | None
) -> CalibrationTokens:
    """Read, tokenise and cut the calibration data.

    Args:
        source: See :data:`CalibrationSource`.
        config: How many sequences of what length.
        tokenizer: The model's; None where it has none, which token ids do not need.
        longest: Longest sequence that the model takes, or None.

    Returns:
        At most ``config.samples`` sequences.

    Raises:
        CalibrationError: The source cannot be read, holds too little, or needs a tokenizer.
    """
    notes: list[str] = []
    length = config.length
    if longest is not None and length > longest:
        notes.append(f"sequences of {longest} tokens instead of {length}: the model takes no more")
        length = longest
    if source is None:
        mixed, notes_of_mix = _mix(config, length, tokenizer)
        return CalibrationTokens(
            sequences=tuple(mixed), source=BUILT_IN, notes=(*notes, *notes_of_mix)
        )
    name, items = _read_source(source)
    given = [found for item in items if (found := _as_ids(name, item)) is not None]
    if given and len(given) != len(items):
        raise CalibrationError(
            f"Calibration data {name} mixes {len(given)} token id lists with "
            f"{len(items) - len(given)} texts. Give one kind."
        )
    if given:
        rows, cut = _trim([row for found in given for row in found], length)
        notes += cut
    else:
        rows = [_Row(ids) for ids in _cut(_tokenize(name, items, tokenizer), length)]
    rows, chosen = _choose(rows, config)
    notes += chosen
    if not rows:
        raise CalibrationError(
            f"Calibration data {name} holds no sequence of {FEWEST_TOKENS} tokens or more. "
            "Give a longer text; 128 sequences of 512 to 2048 tokens are usual."
        )
    masks = tuple(row.counted for row in rows)
    return CalibrationTokens(
        sequences=tuple(row.ids for row in rows),
        source=name,
        notes=tuple(notes),
        counted=masks if any(mask is not None for mask in masks) else (),
    )


def check_ids(tokens: CalibrationTokens, vocabulary: int) -> None:
    """Refuse ids that the model has no embedding for.

    Args:
        tokens: The calibration.
        vocabulary: Rows of the embedding.

    Raises:
        CalibrationError: An id is negative or too large.
    """
    largest = max(int(sequence.max()) for sequence in tokens.sequences)
    smallest = min(int(sequence.min()) for sequence in tokens.sequences)
    if smallest < 0 or largest >= vocabulary:
        raise CalibrationError(
            f"Calibration data {tokens.source} holds token ids {smallest}..{largest}; the model's "
            f"embedding has {vocabulary} rows. Tokenise it with the model's own tokenizer."
        )


def _mix(
    config: CalibrationConfig, length: int, tokenizer: Any | None
) -> tuple[list[Tensor], list[str]]:
    """Take sequences of every built-in kind, as many as its share, evenly spread."""
    kinds = {
        kind: _cut(_tokenize(BUILT_IN, calibration_documents(kind), tokenizer), length)
        for kind in CALIBRATION_FILES
    }
    dice = torch.Generator().manual_seed(config.seed)
    placed: list[tuple[float, Tensor]] = []
    for kind, count in _shares({k: len(s) for k, s in kinds.items()}, config.samples).items():
        sequences = kinds[kind]
        chosen = range(count)
        if config.seed:
            order = torch.randperm(len(sequences), generator=dice)[:count]
            chosen = sorted(order.tolist())  # type: ignore[assignment]
        placed += [((place + 0.5) / count, sequences[i]) for place, i in enumerate(chosen)]
    mixed = [sequence for _, sequence in sorted(placed, key=lambda pair: pair[0])]
    if len(mixed) < config.samples:
        note = f"{len(mixed)} sequences instead of {config.samples}: the text holds no more"
        return mixed, [note]
    return mixed, []


def _shares(available: Mapping[str, int], wanted: int) -> dict[str, int]:
    """Divide sequences among kinds by their shares; what one lacks the others give."""
    other = (1 - SHARE_OF_PROSE) / (len(available) - 1)
    shares = {kind: SHARE_OF_PROSE if kind == PROSE else other for kind in available}
    counts = dict.fromkeys(available, 0)
    for _ in range(min(wanted, sum(available.values()))):
        open_kinds = [kind for kind in available if counts[kind] < available[kind]]
        # The one that is furthest behind its share.
        behind = min(open_kinds, key=lambda kind: (counts[kind] + 1) / shares[kind])
        counts[behind] += 1
    return counts


def _read_source(source: str | Path | Sequence[Any]) -> tuple[str, list[Any]]:
    if not isinstance(source, str | Path):
        # What a tokenizer returns is one item, not a list of its keys.
        whole = isinstance(source, Mapping | Tensor) or not isinstance(source, Iterable)
        items = [source] if whole else list(source)
        if not items:
            raise CalibrationError("The calibration list is empty. Give at least one text.")
        return "a list given in Python", items
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"Cannot read calibration file {path}: {error}. Give a UTF-8 text file, or JSON lines "
            "with 'text', 'messages' or 'input_ids'."
        ) from error
    if path.suffix == ".jsonl":
        return path.name, _read_json_lines(path, text)
    if not text.strip():
        raise CalibrationError(f"Calibration file {path} is empty. Give a text of some pages.")
    return path.name, [text]


def _read_json_lines(path: Path, text: str) -> list[Any]:
    items = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise CalibrationError(
                f"{path} line {number} is not JSON: {error}. Every line must be one object."
            ) from error
        if not isinstance(value, Mapping) or not {"text", "messages", "input_ids"} & set(value):
            raise CalibrationError(
                f"{path} line {number} has none of 'text', 'messages' and 'input_ids'. "
                'Example: {"text": "..."}'
            )
        items.append(value)
    if not items:
        raise CalibrationError(f"Calibration file {path} is empty. Give one object per line.")
    return items


def _as_ids(name: str, item: Any) -> list[_Row] | None:
    """Token ids of an item that holds some, row by row, without padding; None: it is text."""
    beside: dict[str, Any] = {}
    if isinstance(item, Mapping):
        if "input_ids" not in item:
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
        return [_Row(ids, mask) for ids, mask in zip(rows, counted, strict=True)]
    return [
        _Row(ids[kept != 0], None if mask is None else mask[kept != 0])
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


def _tokenize(name: str, items: Iterable[Any], tokenizer: Any | None) -> Tensor:
    if tokenizer is None:
        raise CalibrationError(
            f"Calibration data {name} is text, and the model folder has no tokenizer. "
            "Add the tokenizer's files, or give lists of token ids."
        )
    joined: list[int] = []
    for item in items:
        text = _as_text(name, item, tokenizer)
        if joined and tokenizer.eos_token_id is not None:
            joined.append(tokenizer.eos_token_id)
        joined += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(joined, dtype=torch.int64)


def _as_text(name: str, item: Any, tokenizer: Any) -> str:
    messages = item.get("messages") if isinstance(item, Mapping) else item
    if isinstance(item, Mapping) and "text" in item:
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


def _cut(ids: Tensor, length: int) -> list[Tensor]:
    if len(ids) < length:
        return [ids] if len(ids) >= FEWEST_TOKENS else []
    return list(torch.split(ids[: len(ids) // length * length], length))


def _trim(rows: list[_Row], length: int) -> tuple[list[_Row], list[str]]:
    """Shorten what is too long and leave out what is too short; both are noted."""
    notes = []
    longer = sum(len(row.ids) > length for row in rows)
    if longer:
        notes.append(f"{longer} of {len(rows)} sequences cut to {length} tokens")
    shorter = sum(len(row.ids) < FEWEST_TOKENS for row in rows)
    if shorter:
        notes.append(
            f"{shorter} of {len(rows)} sequences left out: fewer than {FEWEST_TOKENS} tokens"
        )
    return [row.head(length) for row in rows if len(row.ids) >= FEWEST_TOKENS], notes


def _choose(rows: list[_Row], config: CalibrationConfig) -> tuple[list[_Row], list[str]]:
    """Take the first ones, or with a seed other than 0 a random choice, in the text's order."""
    if len(rows) < config.samples:
        found = f"{len(rows)} sequence{'' if len(rows) == 1 else 's'}"
        return rows, [f"{found} instead of {config.samples}: the text holds no more"]
    if config.seed == 0:
        return rows[: config.samples], []
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(rows), generator=generator)[: config.samples]
    return [rows[i] for i in sorted(chosen.tolist())], []


def _stack_equal(rows: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """Stack rows of equal length, at most so many; lengths in order of first appearance."""
    by_length: dict[int, list[Tensor]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    return [
        torch.stack(same[start : start + batch_size])
        for same in by_length.values()
        for start in range(0, len(same), batch_size)
    ]
