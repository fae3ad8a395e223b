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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.data import CALIBRATION_FILES, PROSE, calibration_documents
from halfbyte.errors import CalibrationError
from halfbyte.quant_config import CalibrationConfig
from halfbyte.quantize.calibration_source import (
    CalibrationRow,
    CalibrationSource,
    as_ids,
    read_source,
    tokenize,
)

BUILT_IN = "built-in (prose, code, dialogue, languages, technical)"
SHARE_OF_PROSE = 0.4
"""Of the built-in sequences, where there are enough; the other kinds share the rest evenly."""
FEWEST_TOKENS = 2


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
    name, items = read_source(source)
    given = [found for item in items if (found := as_ids(name, item)) is not None]
    if given and len(given) != len(items):
        raise CalibrationError(
            f"Calibration data {name} mixes {len(given)} token id lists with "
            f"{len(items) - len(given)} texts. Give one kind."
        )
    if given:
        rows, cut = _trim([row for found in given for row in found], length)
        notes += cut
    else:
        # Only a random choice needs to know all of the text.
        enough = None if config.seed else config.samples * length
        ids = tokenize(name, items, tokenizer, enough)
        rows = [CalibrationRow(sequence) for sequence in _cut(ids, length)]
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
        kind: _cut(tokenize(BUILT_IN, calibration_documents(kind), tokenizer), length)
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


def _cut(ids: Tensor, length: int) -> list[Tensor]:
    if len(ids) < length:
        return [ids] if len(ids) >= FEWEST_TOKENS else []
    return list(torch.split(ids[: len(ids) // length * length], length))


def _trim(rows: list[CalibrationRow], length: int) -> tuple[list[CalibrationRow], list[str]]:
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


def _choose(
    rows: list[CalibrationRow], config: CalibrationConfig
) -> tuple[list[CalibrationRow], list[str]]:
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
