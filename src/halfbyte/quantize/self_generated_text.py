"""Text that the model writes itself, for when no text like its workload is at hand.

Sampled at temperature 1, token by token, each sequence from the token that begins a text; an
end-of-text token begins the next one within the sequence. That is the model's own distribution of
text, which is what a quantized copy should keep where nothing better is known.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from halfbyte.checkpoint.atomic import write_atomically
from halfbyte.errors import ModelError, first_line
from halfbyte.evaluate.loading import Subject, open_subject
from halfbyte.quant_config import CalibrationConfig

SELF = "self"
"""In place of a calibration file: the model's own text."""
BATCH_SIZE = 16

Progress = Callable[[int, int], None]
"""Called after each batch with (sequences done, sequences in all)."""


def generate_text(
    model: Any | str | Path,
    config: CalibrationConfig,
    *,
    batch_size: int = BATCH_SIZE,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> list[list[int]]:
    """Let a model write calibration sequences.

    Args:
        model: A loaded model, or its folder; the whole of it is held in memory.
        config: How many sequences of what length; the seed chooses the text.
        batch_size: Sequences written at a time. Changes speed and, like the seed, the text.
        dtype: What a model from a folder computes in.
        progress: Called after each batch.

    Returns:
        Token ids per sequence.

    Raises:
        ModelError: The model cannot be loaded, or computes what is not a number.
    """
    subject = open_subject(model, dtype=dtype)
    length = min(config.length, subject.longest or config.length)
    found: list[list[int]] = []
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        while len(found) < config.samples:
            count = min(batch_size, config.samples - len(found))
            found += _write(subject, count, length).tolist()
            if progress is not None:
                progress(len(found), config.samples)
    return found


def save_text(sequences: list[list[int]], path: Path) -> None:
    """Write sequences as JSON lines that quantizing reads.

    Args:
        sequences: Token ids.
        path: The file; a partial one is never left under its name.
    """
    lines = "".join(json.dumps({"input_ids": ids}) + "\n" for ids in sequences)
    write_atomically(path, [lines.encode()])


def _write(subject: Subject, count: int, length: int) -> Tensor:
    """Sample sequences: int64 [count, length]."""
    ids = torch.full((count, 1), _first_token(subject), device=subject.input_device)
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length - 1
    )
    # Passed beside the config: in it, None would mean the model's own.
    try:
        found = subject.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            eos_token_id=None,
            pad_token_id=0,
        )
    except RuntimeError as error:
        raise ModelError(
            f"{subject.name} cannot write text in {subject.dtype_name}: {first_line(error)}. Look "
            "for damaged weights, or compute in float32."
        ) from error
    assert isinstance(found, Tensor)
    return found.cpu()


def _first_token(subject: Subject) -> int:
    """Give the token that begins a text: BOS, or what ends the one before."""
    config = subject.model.config.get_text_config()
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        token = token[0] if isinstance(token, list) else token
        if isinstance(token, int) and 0 <= token < (subject.vocabulary or token + 1):
            return token
    return 0
