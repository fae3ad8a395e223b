"""How fast a model runs here: loading, a prompt, and one token after the other.

::

    folder ──own process──> load ──> prompt x repeats ──> tokens x repeats ──> SpeedResult
                                      beside it: how fast this machine reads memory
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.errors import ConfigError, ModelError
from halfbyte.evaluate.divergence import DivergenceResult
from halfbyte.integrations.activations import measure_rounding
from halfbyte.integrations.generation import Generator, Sampling, Timing
from halfbyte.kernels.native_library import open_library
from halfbyte.machine.memory import resident_memory_bytes
from halfbyte.model.context_length import max_context_length
from halfbyte.nn.linear import QuantLinear

READ_BYTES = 256 * 2**20
"""Stretch of memory that is read to see how fast that is; larger than a core's own caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedResult:
    """One model's speed; medians of the repeats."""

    load_seconds: float
    memory_bytes: int
    """Of the process, with the model loaded and run."""
    prompt_tokens: int
    prompt_rate: float
    """Prompt tokens per second."""
    first_token_seconds: float
    """From a prompt of that length to the first token."""
    rate: float
    """Generated tokens per second."""
    rates: tuple[float, ...]
    """Of each repeat."""
    read_bytes: int
    """Weights that a generated token reads."""
    memory_rate: float | None
    """Bytes per second that this machine reads; None where the compiled library is absent."""
    compiled_decoder: bool
    why_not: str | None
    threads: int
    dtype: str
    rounding: DivergenceResult | None = None
    """What activations in int8 change; None where there are none."""

    @property
    def memory_share(self) -> float | None:
        """Of the speed of memory that generating reaches."""
        return None if self.memory_rate is None else self.rate * self.read_bytes / self.memory_rate


def measure_speed(
    load: Callable[[], Any],
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    repeats: int = 3,
    head_bits: int = 16,
    rounding: Any = None,
) -> SpeedResult:
    """Measure one model in this process.

    Args:
        load: Loads it.
        prompt_tokens: Length of the prompt; less where the model's positions end before.
        new_tokens: Generated after it.
        repeats: Of both.
        head_bits: 16, or the bits of a rounded head.
        rounding: The tokenizer, where what rounded activations change is to be measured too.

    Returns:
        The result.

    Raises:
        ConfigError: A number is too small.
    """
    if min(prompt_tokens, repeats) < 1 or new_tokens < 2:
        raise ConfigError(
            f"Cannot measure {prompt_tokens} prompt tokens, {new_tokens} new ones, {repeats} "
            "times; 1, 2 and 1 are the least."
        )
    start = time.perf_counter()
    model = load()
    load_seconds = time.perf_counter() - start
    generator = Generator(model, head_bits=head_bits)
    # Text that ends would end the measurement.
    generator.ends = frozenset()
    longest = max_context_length(model.config.get_text_config(decoder=True))
    if longest is not None:
        prompt_tokens = max(min(prompt_tokens, longest - new_tokens), 1)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    settings = Sampling(max_new_tokens=new_tokens)
    timings, memory_rates = [], []
    for repeat in range(repeats + 1):
        ids = [(7919 * (i + 1) + repeat) % vocabulary for i in range(prompt_tokens)]
        timing = Timing(prompt_tokens=prompt_tokens)
        for _ in generator.stream(ids, settings, timing):
            pass
        timings.append(timing)
        memory_rates.append(measure_memory_rate())
    timings = timings[1:]  # the first one warms up
    rates = tuple(timing.rate for timing in timings)
    known = [rate for rate in memory_rates if rate is not None]
    return SpeedResult(
        load_seconds=load_seconds,
        memory_bytes=resident_memory_bytes(),
        prompt_tokens=prompt_tokens,
        prompt_rate=statistics.median(timing.prompt_rate for timing in timings),
        first_token_seconds=statistics.median(timing.prompt_seconds for timing in timings),
        rate=statistics.median(rates),
        rates=rates,
        read_bytes=count_read_bytes(model, generator),
        memory_rate=statistics.median(known) if known else None,
        compiled_decoder=generator.obstacle is None,
        why_not=generator.obstacle,
        threads=torch.get_num_threads(),
        dtype=str(model.dtype).removeprefix("torch."),
        rounding=None if rounding is None else measure_rounding(model, rounding),
    )


def measure_apart(measure: Callable[..., SpeedResult], *arguments: Any) -> SpeedResult:
    """Run a measurement in a process of its own, so that no model's memory counts twice.

    Args:
        measure: A function of a module.
        *arguments: Its arguments.

    Returns:
        What it returned.

    Raises:
        ModelError: The process was killed, for example for want of memory.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(measure, *arguments).result()
        except BrokenProcessPool as error:
            raise ModelError(
                "The measurement ended without a result: its process was killed, as a rule because "
                "memory ran out. halfbyte plan says what a model takes."
            ) from error


def measure_memory_rate() -> float | None:
    """Bytes per second that torch's threads read from memory; None without the library."""
    functions = open_library().functions
    if functions is None:
        return None
    stretch = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    seconds: Sequence[float] = [
        _time(functions.hb_read, stretch.data_ptr(), stretch.nbytes, torch.get_num_threads())
        for _ in range(3)
    ]
    return stretch.nbytes / min(seconds)


def count_read_bytes(model: Any, generator: Generator) -> int:
    """Count the bytes of weights that one generated token reads.

    Args:
        model: The model.
        generator: What runs it.

    Returns:
        Bytes: every weight once but of the embeddings, of which one row is read, unless they are
        the head too.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    apart = {id(tensor) for part in (head, embeddings) for tensor in part.parameters()}
    inside = {id(buffer) for buffer in head.buffers()}
    total: int = sum(p.nbytes for p in model.parameters() if id(p) not in apart)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            # A repacked weight holds scales and zeros itself.
            names = module.weight_names if module.is_repacked else (*module.weight_names, "scales")
            tensors = [module.get_buffer(name) for name in names]
            tensors += [] if module.offsets is None else [module.offsets]
            total += sum(tensor.nbytes for tensor in tensors if id(tensor) not in inside)
    if generator.head is not None:
        return total + generator.head.read_bytes
    dense: int = sum(tensor.nbytes for tensor in [*head.parameters(), *head.buffers()])
    return total + dense


def _time(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start
