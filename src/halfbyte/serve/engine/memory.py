"""What an engine takes in memory, worked out before it takes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from halfbyte.errors import ConfigError
from halfbyte.machine.memory import resident_memory_bytes
from halfbyte.plan.devices import this_machine
from halfbyte.plan.memory import GPU_PROGRAM_BYTES, Load, activation_bytes
from halfbyte.plan.shapes import read_shapes
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.units import format_bytes

FREE_SHARE = 0.5
"""Of the free memory that the cache takes at most, unless told otherwise."""

USUAL_CONTEXT = 4096
"""Tokens of a request for which the cache has room `sequences` times, where the memory is there."""


LOGITS_COPIES = 5
"""That are kept, in float32: of answers and of prompts, and three in which they are rated."""

GRAMMAR_BYTES = 12_000_000
GRAMMAR_TOKEN_BYTES = 700
"""llguidance's table, as measured on vocabularies of 8,192 and 49,152 tokens: 14.7 and 43.0 MB with
the library, and 2.6 MB for a mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """How much of what. Values in bytes but the first."""

    pages: int
    cache: int
    weights: int
    activations: int
    """Of one step, and the logits of all that run."""
    program: int
    """Of the process beside its weights, as measured with the model loaded; on a GPU of the device.
    """
    grammars: int
    """What holding answers to grammars takes, from the first one on."""

    @property
    def total(self) -> int:
        """Of the process, or on the GPU of the device."""
        return self.cache + self.weights + self.activations + self.program + self.grammars


def plan_engine(
    model: PreTrainedModel,
    folder: str | Path,
    bytes_per_token: int,
    context: int,
    config: EngineConfig,
    *,
    before_bytes: int = 0,
) -> EnginePlan:
    """Decide how large the cache is, and say what the engine takes with it.

    Args:
        model: Loaded: what is free now is free beside it.
        folder: With its config.json.
        bytes_per_token: Of keys and values.
        context: Tokens of the longest request.
        config: May say how much memory.
        before_bytes: The process without the model.

    Returns:
        The plan.

    Raises:
        ConfigError: Not even one page fits.
    """
    device = model.get_input_embeddings().weight.device
    on_gpu = device.type == "cuda"
    activations = _count_activations(model, folder, config)
    weights = weight_bytes(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    page_bytes = config.page_tokens * bytes_per_token
    if config.cache_gb is not None:
        available = wanted = int(config.cache_gb * 1e9)
    else:
        free = torch.cuda.mem_get_info(device)[0] if on_gpu else this_machine().bytes
        available = int((free - activations) * FREE_SHARE)
        wanted = config.sequences * min(context, USUAL_CONTEXT) * bytes_per_token
    pages = min(wanted, available) // page_bytes
    program = max(before_bytes, resident_memory_bytes() - weights)
    if pages < 1:
        raise ConfigError(
            f"The cache of keys and values may have {format_bytes(max(available, 0))}; one page of "
            f"{config.page_tokens} tokens takes {format_bytes(page_bytes)}. Give it more with "
            "--cache-gb, or free memory."
        )
    return EnginePlan(
        pages=pages,
        cache=pages * page_bytes,
        weights=weights,
        activations=activations,
        program=GPU_PROGRAM_BYTES if on_gpu else program,
        grammars=0 if on_gpu else GRAMMAR_BYTES + GRAMMAR_TOKEN_BYTES * vocabulary,
    )


def weight_bytes(model: torch.nn.Module) -> int:
    """Count the bytes of a model's tensors, shared ones once."""
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _count_activations(model: PreTrainedModel, folder: str | Path, config: EngineConfig) -> int:
    """Count what one step needs beside weights and cache; 0 where the config does not say."""
    try:
        shapes = read_shapes(folder)
    except ConfigError:
        return 0
    load = Load(
        context=config.step_tokens,
        requests=config.sequences,
        prefill_tokens=config.step_tokens,
        compute_bytes=model.dtype.itemsize,
    )
    logits = 4 * LOGITS_COPIES * config.sequences * shapes.vocabulary
    return activation_bytes(shapes, load) + logits
