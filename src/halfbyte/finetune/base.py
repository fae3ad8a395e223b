"""Load the frozen model that an adapter is trained on, and check what training relies on."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import ConfigError, ModelError
from halfbyte.evaluate.loading import Subject, load_tokenizer, open_subject
from halfbyte.finetune.config import TrainConfig
from halfbyte.machine.arithmetic import has_fast_bf16
from halfbyte.machine.devices import resolve_device
from halfbyte.machine.memory import map_large_blocks, release_memory

PROBE_TOKENS = 8


def load_required_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model, which must have one.

    Args:
        folder: The model's.

    Returns:
        The tokenizer.

    Raises:
        ModelError: The folder has no tokenizer.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ModelError(
            f"Cannot fine-tune {folder}: it has no tokenizer. Copy the tokenizer files of the base "
            "model into it."
        )
    return tokenizer


def open_base(folder: Path, tokenizer: Any, config: TrainConfig) -> Subject:
    """Load the base model with the configured dtype and device.

    Args:
        folder: The model's.
        tokenizer: The model's.
        config: Provides dtype, device, optimizer and length.

    Returns:
        The model, with its tokenizer.

    Raises:
        ConfigError: The length exceeds the model's context, the device does not exist, or the
            optimizer's package is not installed.
    """
    _check_optimizer(config)
    dtype = config.dtype
    device = resolve_device(config.device)
    on_cpu = device.type == "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if not on_cpu or has_fast_bf16() else "float32"
    if on_cpu:
        map_large_blocks()
    subject = open_subject(folder, tokenizer=tokenizer, dtype=dtype, device=device)
    # Buffers of repacking the weights would otherwise stay allocated during training.
    release_memory()
    if subject.longest is not None and config.length > subject.longest:
        raise ConfigError(
            f"length is {config.length}; {folder} takes at most {subject.longest} tokens. "
            f"Use --length {subject.longest} or less."
        )
    return subject


def _check_optimizer(config: TrainConfig) -> None:
    if config.optimizer != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"optimizer is {config.optimizer}, which needs the Python package 'bitsandbytes'. "
            "Install it with: pip install bitsandbytes; or use adamw."
        )


@torch.no_grad()
def check_packing(subject: Subject) -> None:
    """Check that packed examples in one row do not attend to each other.

    Args:
        subject: The model.

    Raises:
        ConfigError: The first example of a row changes the logits of the next one.
    """
    model = subject.model
    first = torch.arange(2 * PROBE_TOKENS, device=subject.input_device).view(2, -1) + 5
    second = torch.arange(PROBE_TOKENS, device=subject.input_device).expand(2, -1) + 7
    ids = torch.cat([first, second], dim=1) % (subject.vocabulary or 64)
    positions = torch.arange(PROBE_TOKENS, device=subject.input_device).repeat(2)[None]
    logits = model(input_ids=ids, position_ids=positions.expand(2, -1), use_cache=False).logits
    one, other = logits[:, PROBE_TOKENS:].float()
    if float((one - other).abs().max()) > 1e-2 * float(one.std()):
        raise ConfigError(
            f"Cannot train {subject.name} with --packing: examples in one row see each other in a "
            f"{type(model).__name__} with {model.config._attn_implementation} attention. "
            "Train without --packing."
        )
