"""Run a model under a stated peak load and put what it takes in memory beside what was planned.

The load is the worst that was asked for: all requests at once, each with the longest prompt, then
a few tokens written by all. It runs in a process of its own, so that its memory is its own too.
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
from halfbyte.machine.memory import release_memory
from halfbyte.model.blocks import build_skeleton
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
class Measured:
    """What one run took. Unit: bytes, unless the name says otherwise."""

    program: int
    """Before the model was loaded: packages, tokenizer, thread pools."""
    weights: int
    """By the tensors' own sizes: of files that are mapped only what was touched is resident."""
    cache: int
    """Keys and values at the end, by the tensors' own sizes."""
    activations: int
    """The peak of the run less everything above, with what the memory allocator did not reuse."""
    total: int
    load_peak: int
    """Largest size while the model was being loaded, which may be more than it takes later."""
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
    measured: Measured

    @property
    def ratio(self) -> float:
        """Planned over measured, in all."""
        return self.planned.total / self.measured.total

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens of all requests."""
        tokens = self.requests * (self.context - self.new_tokens)
        return tokens / max(self.measured.prefill_seconds, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float:
        """Written tokens of all requests."""
        return self.requests * self.new_tokens / max(self.measured.decode_seconds, 1e-9)

    def parts(self) -> tuple[tuple[str, int, int], ...]:
        """Give name, planned and measured bytes of every part, and of all together."""
        plan, found = self.planned, self.measured
        return (
            ("program", plan.program, found.program),
            ("weights", plan.weights, found.weights),
            ("keys and values", plan.cache, found.cache),
            ("activations", plan.activations, found.activations),
            ("together", plan.total, found.total),
        )

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
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
    """Run a model under a peak load in a process of its own.

    Args:
        model: Its folder.
        requests: At the same time.
        context: Tokens of each, prompt and answer together.
        new_tokens: Written by each at the end.
        dtype: What it computes in; "auto": float32 on a CPU, as stored elsewhere.
        device: Where it runs; "auto": the first GPU, or the CPU.

    Returns:
        Planned and measured memory, and the speed of the run.

    Raises:
        ConfigError: A load that cannot be, or more tokens than the model's positions.
        ModelError: The run was killed, for example for want of memory.
    """
    shapes = read_shapes(model)
    if requests < 1 or new_tokens < 1 or context <= new_tokens:
        raise ConfigError(
            f"Cannot run {requests} requests of {context} tokens, {new_tokens} of them written: "
            "at least one request, and a context above the tokens written, are needed."
        )
    if shapes.context and context > shapes.context:
        raise ConfigError(f"context is {context} tokens; '{model}' takes at most {shapes.context}.")
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
                f"The run of '{model}' was killed, perhaps for want of memory: the plan says "
                f"{planned.total / 1e9:.1f} GB in float32. Ask for fewer requests or less context."
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
    """Plan for a run of this process's own kind.

    Args:
        shapes: The model.
        requests: At the same time.
        context: Tokens of each.
        new_tokens: Written by each.
        dtype: What it computes in.
        device: "cpu" or another.
        unpacked: Quantized weights are held as numbers of that type.

    Returns:
        The plan; all prompts run at once, as Transformers does.
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
) -> Measured:
    """Load, run and look; called in a fresh process."""
    _warm_up(Path(folder))
    meter = MemoryMeter(resolve_device(device))
    program = meter.now()
    with meter.watch() as loading:
        subject = open_subject(Path(folder), dtype=dtype, device=device)
        release_memory(subject.input_device)
    weights = sum(t.untyped_storage().nbytes() for t in _weights(subject.model))
    generator = torch.Generator().manual_seed(SEED)
    prompt = torch.randint(0, vocabulary, (requests, context - new_tokens), generator=generator)
    with meter.watch() as running:
        prefill, decode, cache = _work(subject, prompt, new_tokens)
    total = max(running())
    return Measured(
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
    """Bring in what every run needs beside weights: modules, tokenizer, thread pools, buffers."""
    load_tokenizer(folder)
    build_skeleton(load_model_config(folder), torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(1024, 1024, dtype=dtype)
        square @ square
    release_memory()


def _weights(model: torch.nn.Module) -> Iterator[Tensor]:
    """Give each stored tensor once; tied ones share their storage."""
    seen = set()
    for tensor in (*model.parameters(), *model.buffers()):
        place = tensor.untyped_storage().data_ptr()
        if place not in seen:
            seen.add(place)
            yield tensor


@torch.inference_mode()
def _work(subject: Subject, prompt: Tensor, new_tokens: int) -> tuple[float, float, int]:
    """Run the prompts, then write; give the seconds of both and the bytes of the cache."""
    start = time.perf_counter()
    output = subject.model(
        input_ids=prompt.to(subject.input_device), use_cache=True, logits_to_keep=1
    )
    name = "cache" if "cache" in output else "past_key_values"
    cache, token = output[name], output.logits[:, -1:].argmax(dim=-1)
    del output
    middle = time.perf_counter()
    for _ in range(new_tokens):
        logits = subject.model(input_ids=token, use_cache=True, **{name: cache}).logits
        token = logits[:, -1:].argmax(dim=-1)
    end = time.perf_counter()
    size = sum(t.numel() * t.element_size() for t in _tensors(cache))
    return middle - start, end - middle, size


def _tensors(cache: Any) -> Iterator[Tensor]:
    """Find the tensors of a cache, whatever kinds of layer it has."""
    for layer in getattr(cache, "layers", ()):
        yield from (value for value in vars(layer).values() if isinstance(value, Tensor))
