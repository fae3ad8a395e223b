"""Turn calibration data into token sequences and batches, without padding.

Texts are joined with the end-of-text token, tokenized without special tokens, and split into
sequences of equal length. Sequences of token ids are used as they are. The built-in text has five
kinds; each sequence holds one kind, and any stretch of the sequences a mix of them. A batch holds
sequences of one length only, so no padding can enter a Hessian.

Token ids may come with labels, as in training data of Transformers and PEFT. End-to-end training
(end_to_end.py) then counts the predictions of the labeled tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.data import CALIBRATION_FILES, PROSE, calibration_documents
from halfbyte.errors import CalibrationError
from halfbyte.quant_config import MIN_TOKENS, CalibrationConfig
from halfbyte.quantize.calibration_source import (
    CalibrationRow,
    CalibrationSource,
    as_ids,
    read_source,
    tokenize,
)

BUILT_IN = "built-in (prose, code, dialogue, languages, technical)"
SHARE_OF_PROSE = 0.4
"""Fraction of prose in the built-in sequences; the other kinds share the rest evenly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationTokens:
    """The token sequences to calibrate on."""

    sequences: tuple[Tensor, ...]
    """int64 [tokens] each."""
    source: str
    notes: tuple[str, ...] = ()
    counted: tuple[Tensor | None, ...] = ()
    """bool [tokens] each: which tokens have a label; None for a sequence without labels. Empty if
    no sequence has any."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all sequences."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def digest(self) -> str:
        """SHA-256 over lengths, ids and labels; it identifies the calibration data."""
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
            batch_size: Maximum number of sequences per batch.

        Returns:
            int64 [sequences, tokens] each; lengths in order of first appearance.
        """
        return _stack_equal(self.sequences, batch_size)

    def weight_batches(self, batch_size: int) -> list[Tensor] | None:
        """Return the weight of the prediction made at each token, batch by batch.

        In a sequence with labels, the predictions of labeled tokens have weight 1 and the others
        0. All tokens of the sequences without labels together weigh as much as all labeled ones
        together, so that neither kind dominates.

        Args:
            batch_size: As for :meth:`batches`.

        Returns:
            fp32 [sequences, tokens] each; None if no sequence has labels: all weights are equal.
        """
        if not self.counted:
            return None
        # The prediction of a token is made at the one before it.
        masks = [None if m is None else m.roll(-1).float() for m in self.counted]
        for mask in masks:
            if mask is not None:
                mask[-1] = 0.0
        num_labeled = sum(float(mask.sum()) for mask in masks if mask is not None)
        pairs = list(zip(self.sequences, masks, strict=True))
        num_unlabeled = sum(len(ids) for ids, mask in pairs if mask is None)
        weight = num_labeled / max(num_unlabeled, 1)
        weights = [torch.full((len(i),), weight) if m is None else m for i, m in pairs]
        return _stack_equal(weights, batch_size)


def load_calibration(
    source: CalibrationSource,
    config: CalibrationConfig,
    tokenizer: Any | None,
    max_length: int | None,
) -> CalibrationTokens:
    """Read, tokenize and split the calibration data.

    Args:
        source: See :data:`CalibrationSource`.
        config: Number and length of the sequences.
        tokenizer: The model's tokenizer; None if it has none, which only token ids allow.
        max_length: Longest sequence that the model supports; None: no limit.

    Returns:
        At most ``config.samples`` sequences.

    Raises:
        CalibrationError: The source cannot be read, holds too little, or needs a tokenizer.
    """
    notes: list[str] = []
    length = config.length
    if max_length is not None and length > max_length:
        notes.append(
            f"sequences of {max_length} tokens instead of {length}: the model supports no more"
        )
        length = max_length
    if source is None:
        sequences, mix_notes = _mix_built_in(config, length, tokenizer)
        return CalibrationTokens(
            sequences=tuple(sequences), source=BUILT_IN, notes=(*notes, *mix_notes)
        )
    name, items = read_source(source)
    rows, row_notes = _make_rows(name, items, config, length, tokenizer)
    rows, choice_notes = _choose(rows, config)
    notes += [*row_notes, *choice_notes]
    if not rows:
        raise CalibrationError(
            f"Calibration data {name} holds no sequence of {MIN_TOKENS} tokens or more. "
            "Use a longer text; 128 sequences of 512 to 2048 tokens are usual."
        )
    masks = tuple(row.counted for row in rows)
    return CalibrationTokens(
        sequences=tuple(row.ids for row in rows),
        source=name,
        notes=tuple(notes),
        counted=masks if any(mask is not None for mask in masks) else (),
    )


def _make_rows(
    name: str, items: list[Any], config: CalibrationConfig, length: int, tokenizer: Any | None
) -> tuple[list[CalibrationRow], list[str]]:
    """Turn the items of a source into rows of at most ``length`` tokens, with notes."""
    tables = [table for item in items if (table := as_ids(name, item)) is not None]
    if tables and len(tables) != len(items):
        raise CalibrationError(
            f"Calibration data {name} mixes {len(tables)} token id lists with "
            f"{len(items) - len(tables)} texts. Use one kind only."
        )
    if tables:
        return _trim([row for table in tables for row in table], length)
    # Only a random choice needs the whole text.
    min_tokens = None if config.seed else config.samples * length
    ids = tokenize(name, items, tokenizer, min_tokens)
    return [CalibrationRow(sequence) for sequence in _split(ids, length)], []


def check_ids(tokens: CalibrationTokens, vocabulary: int) -> None:
    """Check that the model has an embedding for every token id.

    Args:
        tokens: The calibration data.
        vocabulary: Number of rows of the embedding.

    Raises:
        CalibrationError: An id is negative or too large.
    """
    largest = max(int(sequence.max()) for sequence in tokens.sequences)
    smallest = min(int(sequence.min()) for sequence in tokens.sequences)
    if smallest < 0 or largest >= vocabulary:
        raise CalibrationError(
            f"Calibration data {tokens.source} holds token ids {smallest}..{largest}; the model's "
            f"embedding has {vocabulary} rows. Tokenize it with the model's own tokenizer."
        )


def _mix_built_in(
    config: CalibrationConfig, length: int, tokenizer: Any | None
) -> tuple[list[Tensor], list[str]]:
    """Take sequences of every built-in kind, each evenly spread over the result; with notes."""
    kinds = {
        kind: _split(tokenize(BUILT_IN, calibration_documents(kind), tokenizer), length)
        for kind in CALIBRATION_FILES
    }
    generator = torch.Generator().manual_seed(config.seed)
    placed: list[tuple[float, Tensor]] = []
    counts = _count_by_kind({k: len(s) for k, s in kinds.items()}, config.samples)
    for kind, count in counts.items():
        sequences = kinds[kind]
        chosen = range(count)
        if config.seed:
            order = torch.randperm(len(sequences), generator=generator)[:count]
            chosen = sorted(order.tolist())  # type: ignore[assignment]
        placed += [((rank + 0.5) / count, sequences[i]) for rank, i in enumerate(chosen)]
    mixed = [sequence for _, sequence in sorted(placed, key=lambda pair: pair[0])]
    if len(mixed) < config.samples:
        note = f"{len(mixed)} sequences instead of {config.samples}: the text holds no more"
        return mixed, [note]
    return mixed, []


def _count_by_kind(available: Mapping[str, int], samples: int) -> dict[str, int]:
    """Divide sequences among kinds by their shares; where one has too few, others fill up."""
    other = (1 - SHARE_OF_PROSE) / (len(available) - 1)
    shares = {kind: SHARE_OF_PROSE if kind == PROSE else other for kind in available}
    counts = dict.fromkeys(available, 0)
    for _ in range(min(samples, sum(available.values()))):
        unexhausted = [kind for kind in available if counts[kind] < available[kind]]
        # The kind that is furthest below its share.
        lowest = min(unexhausted, key=lambda kind: (counts[kind] + 1) / shares[kind])
        counts[lowest] += 1
    return counts


def _split(ids: Tensor, length: int) -> list[Tensor]:
    if len(ids) < length:
        return [ids] if len(ids) >= MIN_TOKENS else []
    return list(torch.split(ids[: len(ids) // length * length], length))


def _trim(rows: list[CalibrationRow], length: int) -> tuple[list[CalibrationRow], list[str]]:
    """Truncate rows that are too long and drop those that are too short, with notes on both."""
    notes = []
    num_long = sum(len(row.ids) > length for row in rows)
    if num_long:
        notes.append(f"{num_long} of {len(rows)} sequences truncated to {length} tokens")
    num_short = sum(len(row.ids) < MIN_TOKENS for row in rows)
    if num_short:
        notes.append(
            f"{num_short} of {len(rows)} sequences left out: fewer than {MIN_TOKENS} tokens"
        )
    return [row.head(length) for row in rows if len(row.ids) >= MIN_TOKENS], notes


def _choose(
    rows: list[CalibrationRow], config: CalibrationConfig
) -> tuple[list[CalibrationRow], list[str]]:
    """Take the first rows, or with a nonzero seed a random choice in their original order."""
    if len(rows) < config.samples:
        count = f"{len(rows)} sequence{'' if len(rows) == 1 else 's'}"
        return rows, [f"{count} instead of {config.samples}: the text holds no more"]
    if config.seed == 0:
        return rows[: config.samples], []
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(rows), generator=generator)[: config.samples]
    return [rows[i] for i in sorted(chosen.tolist())], []


def _stack_equal(rows: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """Stack rows of equal length into batches; lengths in order of first appearance."""
    by_length: dict[int, list[Tensor]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    return [
        torch.stack(same[start : start + batch_size])
        for same in by_length.values()
        for start in range(0, len(same), batch_size)
    ]
