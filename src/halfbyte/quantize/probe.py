"""Held-out text through the base and the quantized model, beside the calibration text.

While a block's original weights are in memory, its base form runs on the probe; when they are
rounded, its quantized form does. So the run measures what it cost without a second pass over
either model, and knows what the saved checkpoint must compute.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.data import EVALUATION_FILES, PROSE, evaluation_text
from halfbyte.evaluate.divergence import DivergenceAccumulator
from halfbyte.evaluate.windows import split_windows, tokenize_text
from halfbyte.model.hidden_states import HiddenStates
from halfbyte.model.stream import BlockStream
from halfbyte.quantize.report import QualityReport

WINDOWS = 8
WINDOW = 512
KEPT_LOGITS = 32
"""Positions whose logits are kept to compare a reload with; all of them would be large."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Token windows that are not calibrated on, or calibration text where there is no other."""

    ids: Tensor
    """int64 [windows, tokens]."""
    is_held_out: bool
    text: str = ""
    text_digest: str = ""
    note: str = ""
    """Why it is not held-out text, where that is so."""

    @property
    def shape(self) -> tuple[int, int]:
        """Windows and tokens per window."""
        windows, tokens = self.ids.shape
        return windows, tokens


def make_probe(
    tokenizer: Any | None, fallback: Tensor, longest: int | None, vocabulary: int
) -> Probe:
    """Take the shipped evaluation text, or a calibration sequence where no tokenizer fits.

    Args:
        tokenizer: The model's, or None.
        fallback: A calibration sequence [tokens]; never used to measure quality.
        longest: Longest sequence that the model takes, or None.
        vocabulary: Rows of the embedding.

    Returns:
        The probe.
    """
    instead = fallback[: min(len(fallback), WINDOW)][None]
    if tokenizer is None:
        note = "quality was not measured: the model folder has no tokenizer"
        return Probe(ids=instead, is_held_out=False, note=note)
    text = evaluation_text()
    window = min(WINDOW, longest or WINDOW)
    ids = split_windows(tokenize_text(tokenizer, text), window, limit=WINDOWS).ids
    if int(ids.max()) >= vocabulary:
        note = (
            f"quality was not measured: the tokenizer gives ids up to {int(ids.max())}, the "
            f"embedding has {vocabulary} rows"
        )
        return Probe(ids=instead, is_held_out=False, note=note)
    return Probe(
        ids=ids,
        is_held_out=True,
        text=f"shipped evaluation text ({EVALUATION_FILES[PROSE]})",
        text_digest=hashlib.sha256(text.encode()).hexdigest(),
    )


class Trail:
    """The first probe window's hidden states behind every block of the quantized model."""

    def __init__(self, path: Path, num_blocks: int, tokens: int, width: int, dtype: torch.dtype):
        """Open or make the file."""
        self._states = HiddenStates(path, [(1, tokens)] * num_blocks, width, dtype)

    def write(self, block: int, states: Tensor) -> None:
        """Keep the states of the first window behind a block."""
        self._states.write(block, states[:1])

    def read(self, block: int) -> Tensor:
        """Give the states behind a block: [1, tokens, hidden]."""
        return self._states.read(block)

    def close(self) -> None:
        """Close the file."""
        self._states.close()


def run_tail(stream: BlockStream, ids: Tensor, states: Tensor) -> Tensor:
    """Run what is behind the last block; the stream must stand there.

    Args:
        stream: The stream.
        ids: [windows, tokens].
        states: [windows, tokens, hidden], behind the last block.

    Returns:
        Logits [windows, tokens, vocabulary].
    """
    logits: Tensor = stream.run(ids, states).logits
    return logits


def compute_logits(
    stream: BlockStream, probe: Probe, states: HiddenStates, device: torch.device, *, held: bool
) -> list[Tensor]:
    """Run the tail on every window of the probe.

    Args:
        stream: The stream, standing anywhere.
        probe: The probe.
        states: Its hidden states behind the last block.
        device: Where to compute.
        held: Whether the logits stay there; else they go to the CPU, where there is more room.

    Returns:
        [tokens, vocabulary] per window.
    """
    hidden = states.read(0).to(device)
    found = []
    with stream.at(len(stream.blocks.modules)):
        # One window at a time: logits are as wide as the vocabulary.
        windows = zip(torch.split(probe.ids, 1), torch.split(hidden, 1), strict=True)
        for ids, window in windows:
            logits = run_tail(stream, ids.to(device), window)[0]
            found.append(logits if held else logits.cpu())
    return found


def measure_quality(
    probe: Probe,
    base_logits: list[Tensor],
    quantized_logits: list[Tensor],
    device: torch.device,
) -> QualityReport:
    """Compare both models' logits window by window.

    Args:
        probe: Held-out windows.
        base_logits: [tokens, vocabulary] per window.
        quantized_logits: The same.
        device: Where to compare.

    Returns:
        Perplexities, divergence, agreement.
    """
    accumulator = DivergenceAccumulator()
    for ids, base, quantized in zip(probe.ids, base_logits, quantized_logits, strict=True):
        accumulator.update(base[:-1].to(device), quantized[:-1].to(device), ids[1:])
    return QualityReport.from_divergence(
        accumulator.result(), text=probe.text, text_digest=probe.text_digest
    )
