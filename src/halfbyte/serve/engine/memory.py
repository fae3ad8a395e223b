"""Plan the memory of an engine before it is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from halfbyte.errors import ConfigError
from halfbyte.machine.memory import count_weight_bytes, resident_memory_bytes
from halfbyte.plan.devices import this_machine
from halfbyte.plan.memory import GPU_PROGRAM_BYTES, Load, activation_bytes
from halfbyte.plan.shapes import read_shapes
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.units import format_bytes

FREE_SHARE = 0.5
"""Max share of the free memory for the KV cache, if no size is set."""

USUAL_CONTEXT = 4096
"""Without a configured size, the KV cache holds `max_sequences` requests of this length, memory
permitting."""


LOGITS_COPIES = 5
"""float32 copies of the logits: of answers, of prompts, and three while they are scored."""

GRAMMAR_BYTES = 12_000_000
GRAMMAR_TOKEN_BYTES = 1300
"""Size of llguidance's tables with the library and a mask, built in a thread as the engine does,
whose heap keeps what was freed: 19.5, 73.6 and 120.3 MB for 8,192, 49,152 and 100,000 tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """Memory of an engine."""

    pages: int
    cache_bytes: int
    weight_bytes: int
    activation_bytes: int
    """Activations of one step, and the logits of all running requests."""
    program_bytes: int
    """The process without weights, measured after loading the model; on a GPU, CUDA's overhead."""
    grammar_bytes: int
    """Memory for constrained answers, used from the first one on."""

    @property
    def total_bytes(self) -> int:
        """Memory of the process, or on a GPU of the device."""
        return (
            self.cache_bytes
            + self.weight_bytes
            + self.activation_bytes
            + self.program_bytes
            + self.grammar_bytes
        )


def plan_engine(
    model: PreTrainedModel,
    folder: str | Path,
    bytes_per_token: int,
    context: int,
    config: EngineConfig,
    *,
    step_bytes: int = 0,
    before_bytes: int = 0,
) -> EnginePlan:
    """Decide the size of the KV cache, and estimate the engine's memory.

    Args:
        model: The loaded model; memory that is free now remains free beside it.
        folder: Folder with its config.json.
        bytes_per_token: Size of a token's keys and values.
        context: Max tokens of a request.
        config: May set the size of the cache.
        step_bytes: What the runner allocates for a step; 0: only the shapes tell.
        before_bytes: Memory of the process before the model was loaded.

    Returns:
        The plan.

    Raises:
        ConfigError: Not even one page fits.
    """
    embeddings = model.get_input_embeddings().weight
    on_gpu = embeddings.device.type == "cuda"
    activations = _estimate_activations(model, folder, config, step_bytes)
    weights = count_weight_bytes(model)
    page_bytes = config.page_tokens * bytes_per_token
    if config.cache_gb is not None:
        available = requested = int(config.cache_gb * 1e9)
    else:
        free = torch.cuda.mem_get_info(embeddings.device)[0] if on_gpu else this_machine().bytes
        available = int((free - activations) * FREE_SHARE)
        requested = config.max_sequences * min(context, USUAL_CONTEXT) * bytes_per_token
    pages = min(requested, available) // page_bytes
    program = max(before_bytes, resident_memory_bytes() - weights)
    if pages < 1:
        raise ConfigError(
            f"The KV cache may use {format_bytes(max(available, 0))}, but one page of "
            f"{config.page_tokens} tokens takes {format_bytes(page_bytes)}. Increase --cache-gb or "
            "free some memory."
        )
    return EnginePlan(
        pages=pages,
        cache_bytes=pages * page_bytes,
        weight_bytes=weights,
        activation_bytes=activations,
        program_bytes=GPU_PROGRAM_BYTES if on_gpu else program,
        grammar_bytes=0 if on_gpu else GRAMMAR_BYTES + GRAMMAR_TOKEN_BYTES * embeddings.shape[0],
    )


def _estimate_activations(
    model: PreTrainedModel, folder: str | Path, config: EngineConfig, step_bytes: int
) -> int:
    """Estimate the memory of one step beside weights and cache."""
    try:
        shapes = read_shapes(folder)
    except ConfigError:
        return step_bytes
    load = Load(
        context=config.max_batched_tokens,
        requests=config.max_sequences,
        prefill_tokens=config.max_batched_tokens,
        compute_bytes=model.dtype.itemsize,
    )
    logits = 4 * LOGITS_COPIES * config.max_sequences * shapes.vocabulary
    return max(activation_bytes(shapes, load), step_bytes) + logits
