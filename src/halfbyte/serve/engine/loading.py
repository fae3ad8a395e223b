"""Load a model into an engine: choose the runner and plan the memory."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from halfbyte.errors import ConfigError
from halfbyte.integrations.load import load_model
from halfbyte.machine.memory import resident_memory_bytes
from halfbyte.model.context_length import max_context_length
from halfbyte.nn.gpu_step import find_mismatch
from halfbyte.nn.native_decoder import find_obstacle
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.serve.engine.contract import EngineInfo
from halfbyte.serve.engine.engine import EmbeddedEngine
from halfbyte.serve.engine.gpu_runner import GpuRunner
from halfbyte.serve.engine.grammar import Grammars
from halfbyte.serve.engine.memory import plan_engine
from halfbyte.serve.engine.native_runner import NativeRunner
from halfbyte.serve.engine.page_pool import PagePool
from halfbyte.serve.engine.runner import Pages, Runner, sample_layers
from halfbyte.serve.engine.transformers_runner import TransformersRunner


def open_engine(
    folder: str | Path, config: EngineConfig | None = None, *, tokenizer: Any = None
) -> EmbeddedEngine:
    """Load a model and start an engine with it.

    Args:
        folder: Folder of a model, quantized or not.
        config: Configuration of the engine.
        tokenizer: The model's tokenizer; None: read from the folder when a grammar needs it.

    Returns:
        The running engine.

    Raises:
        ConfigError: There is not enough memory, or the folder is not a model folder.
    """
    opened: Future[EmbeddedEngine] = Future()

    def work() -> None:
        try:
            opened.set_result(_open(Path(folder), config or EngineConfig(), tokenizer))
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's result()
            opened.set_exception(error)

    # In a thread that ends: OpenMP gives each thread its own pool, and with more pool threads than
    # processors, the engine's pool would go to sleep between any two layers.
    threading.Thread(target=work, name="halfbyte-open", daemon=True).start()
    return opened.result()


def _open(folder: Path, config: EngineConfig, tokenizer: Any) -> EmbeddedEngine:
    before = resident_memory_bytes()
    model = load_model(
        folder, dtype=config.dtype, device=config.device, activations=config.activations
    )
    return make_engine(model, folder, config, tokenizer=tokenizer, before_bytes=before)


def make_engine(
    model: PreTrainedModel,
    folder: str | Path,
    config: EngineConfig,
    *,
    tokenizer: Any = None,
    before_bytes: int = 0,
) -> EmbeddedEngine:
    """Start an engine with a loaded model.

    Args:
        model: The model; only the engine may run it from now on.
        folder: Its folder.
        config: Configuration of the engine.
        tokenizer: Its tokenizer; None: read from the folder when a grammar needs it. By then a
            folder may hold another model, or its version may have been removed from a store.
        before_bytes: Memory of the process before the model was loaded.

    Returns:
        The running engine.

    Raises:
        ConfigError: There is not enough memory.
    """
    model.eval()
    runner = choose_runner(model, config)
    context = _find_context(model, config)
    step_bytes = 0
    if isinstance(runner, NativeRunner):
        step_bytes = runner.plan_step_bytes(config.max_batched_tokens, context)
    plan = plan_engine(
        model,
        folder,
        runner.bytes_per_token,
        context,
        config,
        step_bytes=step_bytes,
        before_bytes=before_bytes,
    )
    # No request can be longer than the cache.
    context = min(context, plan.pages * config.page_tokens)
    runner.make_pages(plan.pages, context)
    pool = PagePool(plan.pages, config.page_tokens, share=config.share_prefixes)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ends = model.generation_config.eos_token_id
    ends = frozenset([ends] if isinstance(ends, int) else ends or [])
    info = EngineInfo(
        context=context,
        vocabulary=vocabulary,
        bytes_per_token=runner.bytes_per_token,
        cache_bytes=plan.cache_bytes,
        weight_bytes=plan.weight_bytes,
        planned_bytes=plan.total_bytes,
        runner=runner.description,
    )
    return EmbeddedEngine(
        runner,
        pool,
        info,
        ends=ends,
        grammars=Grammars(
            lambda: tokenizer or AutoTokenizer.from_pretrained(folder), vocabulary, ends
        ),
        max_sequences=config.max_sequences,
        max_batched_tokens=config.max_batched_tokens,
        max_queue=config.max_queue,
        chunk_interval=config.chunk_interval,
    )


def choose_runner(model: PreTrainedModel, config: EngineConfig) -> Runner:
    """Choose the runner.

    Args:
        model: The loaded model.
        config: Configuration of the engine.

    Returns:
        The runner; its description contains the reason.

    Raises:
        ConfigError: The compiled decoder or a rounded head was requested but cannot be used.
    """
    pages = Pages(sample_layers(model), config.page_tokens)
    obstacle: str | None = "not requested"
    if config.runner != "transformers":
        obstacle = find_obstacle(model)
        if obstacle is None:
            return NativeRunner(model, pages, config.head_bits)
        if find_mismatch(model) is None and config.head_bits == 16 and config.runner == "auto":
            return GpuRunner(model, pages)
    if config.runner == "native" or config.head_bits != 16:
        requested = "the compiled decoder" if config.runner == "native" else "a rounded head"
        raise ConfigError(
            f"Cannot use {requested} with this model: {obstacle}. Leave --runner and --head-bits "
            "at their defaults."
        )
    return TransformersRunner(model, pages, reason=f"no compiled decoder: {obstacle}")


def _find_context(model: PreTrainedModel, config: EngineConfig) -> int:
    settings = model.config.get_text_config(decoder=True)
    longest = max_context_length(settings) or 32768
    if config.context is not None and config.context > longest:
        raise ConfigError(
            f"context is {config.context}; the model supports at most {longest} tokens. Lower "
            "--context."
        )
    return config.context or longest
