"""Measures a model's memory under a peak load and compares it with the plan.

The load is the worst case: all requests at once, each with the longest prompt, then a few decode
steps for all of them. It runs in a separate process, so that no other memory is counted.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ConfigError, ModelError
from halfbyte.evaluate.loading import Subject, load_tokenizer, open_subject
from halfbyte.judge.memory_meter import MemoryMeter
from halfbyte.machine.devices import resolve_device
from halfbyte.machine.memory import count_weight_bytes, release_memory
from halfbyte.model.blocks import build_skeleton
from halfbyte.model.kv_cache import cache_argument, cache_of
from halfbyte.model.weights import load_model_config
from halfbyte.plan.memory import (
    CPU_PROGRAM_BYTES,
    GPU_PROGRAM_BYTES,
    Load,
    MemoryPlan,
    plan_memory,
)
from halfbyte.plan.shapes import ModelShapes, read_shapes

SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredLoad:
    """Measured memory and time of one run. Unit: bytes, unless the name says otherwise."""

    program: int
    """Before the model is loaded: packages, tokenizer, thread pools."""
    weights: int
    """Sum of tensor sizes; of memory-mapped files only the pages that were read are resident."""
    cache: int
    """KV cache at the end; sum of tensor sizes."""
    activations: int
    """Peak of the run minus everything above, including fragmentation of the allocator."""
    total: int
    """Peak of the run."""
    load_peak: int
    """Peak while the model is being loaded; may exceed ``total``."""
    prefill_seconds: float
    decode_seconds: float
    dtype: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Planned and measured memory of one model under one load."""

    model: str
    requests: int
    context: int
    new_tokens: int
    planned: MemoryPlan
    measured: MeasuredLoad

    @property
    def ratio(self) -> float:
        """Planned total divided by measured total."""
        return self.planned.total / self.measured.total

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prefill speed, all requests together."""
        tokens = self.requests * (self.context - self.new_tokens)
        return tokens / max(self.measured.prefill_seconds, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float:
        """Decode speed, all requests together."""
        return self.requests * self.new_tokens / max(self.measured.decode_seconds, 1e-9)

    def parts(self) -> tuple[tuple[str, int, int], ...]:
        """Return name, planned and measured bytes of every part and of the total."""
        plan, measured = self.planned, self.measured
        return (
            ("program", plan.program, measured.program),
            ("weights", plan.weights, measured.weights),
            ("KV cache", plan.cache, measured.cache),
            ("activations", plan.activations, measured.activations),
            ("total", plan.total, measured.total),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {
            "ratio": self.ratio,
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }


def profile(
    model: str | Path,
    *,
    requests: int = 4,
    context: int = 1024,
    new_tokens: int = 8,
    dtype: str = "auto",
    device: str = "auto",
) -> Profile:
    """Measure a model's memory under a peak load, in a separate process.

    Args:
        model: Folder of the model.
        requests: Number of concurrent requests.
        context: Tokens of each request, prompt and answer together.
        new_tokens: Tokens that each request generates.
        dtype: Compute dtype; "auto": float32 on a CPU, as stored elsewhere.
        device: Where it runs; "auto": the first GPU, or the CPU.

    Returns:
        Planned and measured memory, and the speed of the run.

    Raises:
        ConfigError: The load is empty or exceeds the model's context length.
        ModelError: The run was killed, for example because memory ran out.
    """
    shapes = read_shapes(model)
    if requests < 1 or new_tokens < 1 or context <= new_tokens:
        raise ConfigError(
            f"Cannot run {requests} requests of {context} tokens, {new_tokens} of them generated: "
            "requests and new tokens must be 1 or more, and the context longer than the new tokens."
        )
    if shapes.context and context > shapes.context:
        raise ConfigError(
            f"context is {context} tokens; '{model}' takes at most {shapes.context}. Use "
            f"{shapes.context} or less."
        )
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        job = pool.submit(
            _run, str(model), requests, context, new_tokens, dtype, device, shapes.vocabulary
        )
        try:
            measured = job.result()
        except BrokenProcessPool as error:
            planned = plan_for(shapes, requests, context, new_tokens, "float32", "cpu")
            raise ModelError(
                f"The run of '{model}' was killed, probably because memory ran out: the plan is "
                f"{planned.total / 1e9:.1f} GB in float32. Use fewer requests or a shorter context."
            ) from error
    return Profile(
        model=str(model),
        requests=requests,
        context=context,
        new_tokens=new_tokens,
        planned=plan_for(shapes, requests, context, new_tokens, measured.dtype, measured.device),
        measured=measured,
    )


def plan_for(
    shapes: ModelShapes,
    requests: int,
    context: int,
    new_tokens: int,
    dtype: str,
    device: str,
    *,
    unpacked: bool = False,
) -> MemoryPlan:
    """Plan the memory of a run through Transformers.

    Args:
        shapes: Shapes of the model.
        requests: Number of concurrent requests.
        context: Tokens of each request.
        new_tokens: Tokens that each request generates.
        dtype: Compute dtype.
        device: "cpu" or another device type.
        unpacked: Whether quantized weights are dequantized to that dtype.

    Returns:
        The plan; all prompts are prefilled in one batch.
    """
    itemsize: int = getattr(torch, dtype).itemsize
    return plan_memory(
        shapes,
        Load(
            bits=8 * itemsize if unpacked or not shapes.stored_bits else shapes.stored_bits,
            group_size=shapes.stored_group_size or 128,
            context=context,
            requests=requests,
            cache_type=dtype,
            compute_bytes=itemsize,
            prefill_tokens=requests * (context - new_tokens),
            growing_cache=True,
            program_bytes=CPU_PROGRAM_BYTES if device == "cpu" else GPU_PROGRAM_BYTES,
        ),
    )


def _run(
    folder: str,
    requests: int,
    context: int,
    new_tokens: int,
    dtype: str,
    device: str,
    vocabulary: int,
) -> MeasuredLoad:
    """Load the model, run the load and measure; called in a fresh process."""
    _warm_up(Path(folder))
    meter = MemoryMeter(resolve_device(device))
    program = meter.now()
    with meter.watch() as loading:
        subject = open_subject(Path(folder), dtype=dtype, device=device)
        release_memory(subject.input_device)
    weights = count_weight_bytes(subject.model)
    generator = torch.Generator().manual_seed(SEED)
    prompt = torch.randint(0, vocabulary, (requests, context - new_tokens), generator=generator)
    with meter.watch() as running:
        prefill, decode, cache = _run_load(subject, prompt, new_tokens)
    total = max(running())
    return MeasuredLoad(
        program=program,
        weights=weights,
        cache=cache,
        activations=total - program - weights - cache,
        total=total,
        load_peak=max(loading()),
        prefill_seconds=prefill,
        decode_seconds=decode,
        dtype=subject.dtype_name,
        device=subject.input_device.type,
    )


def _warm_up(folder: Path) -> None:
    """Load what every run needs besides weights: modules, tokenizer, thread pools, buffers."""
    load_tokenizer(folder)
    build_skeleton(load_model_config(folder), torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(1024, 1024, dtype=dtype)
        square @ square
    release_memory()


@torch.inference_mode()
def _run_load(subject: Subject, prompt: Tensor, new_tokens: int) -> tuple[float, float, int]:
    """Run prefill and decode steps; return the seconds of both and the bytes of the KV cache."""
    start = time.perf_counter()
    output = subject.model(
        input_ids=prompt.to(subject.input_device), use_cache=True, logits_to_keep=1
    )
    cache, token = cache_of(output), output.logits[:, -1:].argmax(dim=-1)
    keywords = {cache_argument(subject.model): cache}
    del output
    middle = time.perf_counter()
    for _ in range(new_tokens):
        logits = subject.model(input_ids=token, use_cache=True, **keywords).logits
        token = logits[:, -1:].argmax(dim=-1)
    end = time.perf_counter()
    size = sum(t.numel() * t.element_size() for t in _cache_tensors(cache))
    return middle - start, end - middle, size


def _cache_tensors(cache: Any) -> Iterator[Tensor]:
    """Yield the tensors of a KV cache with layers of any type."""
    for layer in getattr(cache, "layers", ()):
        yield from (value for value in vars(layer).values() if isinstance(value, Tensor))
