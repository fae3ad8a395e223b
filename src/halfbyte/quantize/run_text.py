"""The text of a run: what calibrates it, and what is held out to judge it by.

::

    file, ids or "self" -> token sequences, checked against the vocabulary -> the probe's windows
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from halfbyte.evaluate.loading import load_tokenizer
from halfbyte.machine.memory import release_memory
from halfbyte.model.context_length import max_context_length
from halfbyte.model.weights import ModelWeights
from halfbyte.quant_config import CalibrationConfig
from halfbyte.quantize.calibration import (
    CalibrationTokens,
    check_ids,
    load_calibration,
)
from halfbyte.quantize.calibration_source import CalibrationSource
from halfbyte.quantize.fingerprint import fingerprint_model
from halfbyte.quantize.journal import KEPT_PREFIX
from halfbyte.quantize.meter import Meter
from halfbyte.quantize.probe import Probe, make_probe
from halfbyte.quantize.progress import Progress
from halfbyte.quantize.resources import resolve_dtype
from halfbyte.quantize.self_generated_text import SELF, generate_text, save_text


def read_text(
    text: CalibrationSource,
    weights: ModelWeights,
    calibration: CalibrationConfig,
    *,
    folder: Path,
    dtype: str,
    quality: bool,
    progress: Progress,
    meter: Meter,
) -> tuple[CalibrationTokens, Probe]:
    """Turn calibration data into token ids, and choose what the run is judged by.

    Args:
        text: Calibration data; SELF: what the model writes.
        weights: Of the model; nothing of it need be loaded.
        calibration: How much text.
        folder: Of the journal, where text that the model wrote is kept.
        dtype: What the user asked to compute in.
        quality: Whether held-out text is judged by.
        progress: Told what is being done.
        meter: Counts the time of writing text.

    Returns:
        The sequences, and the probe.
    """
    if is_own_text(text):
        text = _write_own_text(weights, calibration, folder, dtype, progress, meter)
    progress.phase("reading the text")
    tokenizer = load_tokenizer(weights.folder)
    text_config = weights.config.get_text_config()
    longest = max_context_length(text_config)
    tokens = load_calibration(text, calibration, tokenizer, longest)
    vocabulary = int(text_config.vocab_size)
    check_ids(tokens, vocabulary)
    probe = make_probe(tokenizer if quality else None, tokens.sequences[0], longest, vocabulary)
    return tokens, probe


def is_own_text(text: CalibrationSource) -> bool:
    """Whether the model is to write its calibration text."""
    # A table of ids compared with a word would be a table.
    return isinstance(text, str) and text == SELF


def find_own_text(weights: ModelWeights, calibration: CalibrationConfig, folder: Path) -> Path:
    """Say where the text that the model writes is kept.

    Args:
        weights: Of the model; nothing of it need be loaded.
        calibration: How much text.
        folder: Of the journal.

    Returns:
        The file, named for all that decides what is in it.
    """
    asked = f"{fingerprint_model(weights.files)}{calibration.to_dict()}"
    name = f"{KEPT_PREFIX}{SELF}-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.jsonl"
    return folder / name


def _write_own_text(
    weights: ModelWeights,
    calibration: CalibrationConfig,
    folder: Path,
    dtype: str,
    progress: Progress,
    meter: Meter,
) -> Path:
    """Let the model write its calibration text, once for a folder: a resumed run reads it."""
    path = find_own_text(weights, calibration, folder)
    if not path.exists():
        progress.phase("letting the model write its calibration text")
        with meter.timed("text"):
            chosen, _ = resolve_dtype(dtype, weights.dtype, weights.device)
            computing = str(chosen).removeprefix("torch.")
            found = generate_text(weights.folder, calibration, dtype=computing)
        save_text(found, path)
        release_memory()
    return path
