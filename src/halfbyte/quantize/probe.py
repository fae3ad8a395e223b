"""The probe: held-out text that runs through the base and the quantized model during a run.

While a block's original weights are in memory, the block runs on the probe; once they are rounded,
it runs again. So the run measures quality without a second pass over either model, and has
reference outputs for checking the saved checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
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
"""Last positions whose logits are kept for the reload check, to save memory."""


WindowLogits = Callable[[int], Tensor]
"""Returns a model's logits [tokens, vocabulary] of one window of the probe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Windows of held-out tokens, or one calibration sequence if no held-out text can be used."""

    ids: Tensor
    """int64 [windows, tokens]."""
    is_held_out: bool
    text: str = ""
    text_digest: str = ""
    note: str = ""
    """Why the probe is not held-out text; empty if it is."""

    @property
    def shape(self) -> tuple[int, int]:
        """Windows and tokens per window."""
        windows, tokens = self.ids.shape
        return windows, tokens


def make_probe(
    tokenizer: Any | None, fallback: Tensor, max_length: int | None, vocabulary: int
) -> Probe:
    """Tokenize the bundled evaluation text, or use a calibration sequence if that is impossible.

    Args:
        tokenizer: The model's tokenizer, or None.
        fallback: A calibration sequence [tokens]; used for the reload check, not for quality.
        max_length: Maximum context length of the model, or None.
        vocabulary: Rows of the embedding.

    Returns:
        The probe.
    """
    fallback_ids = fallback[: min(len(fallback), WINDOW)][None]
    if tokenizer is None:
        note = "quality was not measured: the model folder has no tokenizer"
        return Probe(ids=fallback_ids, is_held_out=False, note=note)
    text = evaluation_text()
    window = min(WINDOW, max_length or WINDOW)
    ids = split_windows(tokenize_text(tokenizer, text), window, limit=WINDOWS).ids
    if int(ids.max()) >= vocabulary:
        note = (
            f"quality was not measured: the tokenizer gives ids up to {int(ids.max())}, the "
            f"embedding has {vocabulary} rows"
        )
        return Probe(ids=fallback_ids, is_held_out=False, note=note)
    return Probe(
        ids=ids,
        is_held_out=True,
        text=f"shipped evaluation text ({EVALUATION_FILES[PROSE]})",
        text_digest=hashlib.sha256(text.encode()).hexdigest(),
    )


class ProbeTrace:
    """Outputs of all blocks of the quantized model for the first probe window, in a file."""

    def __init__(
        self,
        path: Path,
        num_blocks: int,
        tokens: int,
        token_shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        """Open or create the file."""
        self._states = HiddenStates(path, [(1, tokens)] * num_blocks, token_shape, dtype)

    def write(self, block: int, states: Tensor) -> None:
        """Store a block's output for the first window."""
        self._states.write(block, states[:1])

    def read(self, block: int) -> Tensor:
        """Return a block's output: [1, tokens, *token_shape]."""
        return self._states.read(block)

    def close(self) -> None:
        """Close the file."""
        self._states.close()


def run_tail(stream: BlockStream, ids: Tensor, states: Tensor) -> Tensor:
    """Run the model's tail: final norm and head.

    Args:
        stream: The stream, positioned at the tail.
        ids: [windows, tokens].
        states: Output of the last block, [windows, tokens, hidden].

    Returns:
        Logits [windows, tokens, vocabulary].
    """
    logits: Tensor = stream.run(ids, states).logits
    return logits


def compute_logits(
    stream: BlockStream, probe: Probe, states: Tensor, device: torch.device, window: int
) -> Tensor:
    """Run the tail on one window of the probe, because logits are as wide as the vocabulary.

    Args:
        stream: The stream, not positioned at any block.
        probe: The probe.
        states: Output of the last block, [windows, tokens, hidden].
        device: Device to compute on.
        window: Index of the window.

    Returns:
        [tokens, vocabulary] on the device.
    """
    part = slice(window, window + 1)
    with stream.at(len(stream.blocks.modules)):
        return run_tail(stream, probe.ids[part].to(device), states[part].to(device))[0]


def measure_quality(
    probe: Probe, base_logits: WindowLogits, quantized_logits: WindowLogits, device: torch.device
) -> QualityReport:
    """Compare the logits of both models; those of one window are in memory at a time.

    Args:
        probe: Held-out windows.
        base_logits: Of the base model.
        quantized_logits: Of the quantized model.
        device: Device to compute on.

    Returns:
        Perplexities, divergence and agreement.
    """
    accumulator = DivergenceAccumulator()
    for window, ids in enumerate(probe.ids):
        base, quantized = base_logits(window)[:-1], quantized_logits(window)[:-1]
        accumulator.update(base.to(device), quantized, ids[1:])
        # Before the next window's are computed.
        del base, quantized
    return QualityReport.from_divergence(
        accumulator.result(), text=probe.text, text_digest=probe.text_digest
    )
