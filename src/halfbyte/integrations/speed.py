"""Measure how fast a model loads, processes a prompt, and generates tokens on this machine.

::

    folder ──separate process──> load ──> (prompt, tokens, memory) x repeats ──> SpeedResult
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
from halfbyte.model.experts import UnfusedExperts
from halfbyte.nn.linear import QuantLinear

READ_BYTES = 256 * 2**20
"""Buffer that is read to measure memory bandwidth; larger than a core's private caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedResult:
    """Speed of a model; medians over the repeats."""

    load_seconds: float
    memory_bytes: int
    """Memory of the process after running the model."""
    prompt_tokens: int
    prompt_rate: float
    """Prompt tokens per second."""
    first_token_seconds: float
    """Time to the first token, for a prompt of that length."""
    rate: float
    """Generated tokens per second."""
    rates: tuple[float, ...]
    """Generated tokens per second in each repeat."""
    read_bytes: int
    """Bytes of weights read per generated token."""
    memory_rate: float | None
    """Memory bandwidth of this machine in bytes per second; None without the compiled library."""
    compiled_decoder: bool
    why_not: str | None
    """Why the compiled decoder was not used."""
    threads: int
    dtype: str
    rounding: DivergenceResult | None = None
    """Divergence caused by int8 activations; None if they are not used."""

    @property
    def memory_share(self) -> float | None:
        """Fraction of the memory bandwidth that generation achieves."""
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
        load: Loads the model.
        prompt_tokens: Length of the prompt; reduced to fit the model's positions.
        new_tokens: Tokens generated after it.
        repeats: Number of repeats.
        head_bits: 16, or the bits of a rounded head.
        rounding: The tokenizer, to also measure the divergence caused by int8 activations.

    Returns:
        The result.

    Raises:
        ConfigError: A number is too small.
    """
    if min(prompt_tokens, repeats) < 1 or new_tokens < 2:
        raise ConfigError(
            f"Cannot measure {prompt_tokens} prompt tokens and {new_tokens} new tokens {repeats} "
            "times; use at least 1, 2 and 1."
        )
    start = time.perf_counter()
    model = load()
    load_seconds = time.perf_counter() - start
    generator = Generator(model, head_bits=head_bits)
    # Do not stop at end-of-text tokens.
    generator.ends = frozenset()
    longest = max_context_length(model.config.get_text_config(decoder=True))
    if longest is not None:
        prompt_tokens = max(min(prompt_tokens, longest - new_tokens), 1)
    timings, memory_rates = _time_generations(generator, prompt_tokens, new_tokens, repeats)
    rates = tuple(timing.rate for timing in timings)
    return SpeedResult(
        load_seconds=load_seconds,
        memory_bytes=resident_memory_bytes(),
        prompt_tokens=prompt_tokens,
        prompt_rate=statistics.median(timing.prompt_rate for timing in timings),
        first_token_seconds=statistics.median(timing.prompt_seconds for timing in timings),
        rate=statistics.median(rates),
        rates=rates,
        read_bytes=count_read_bytes(model, generator),
        memory_rate=statistics.median(memory_rates) if memory_rates else None,
        compiled_decoder=generator.obstacle is None,
        why_not=generator.obstacle,
        threads=torch.get_num_threads(),
        dtype=str(model.dtype).removeprefix("torch."),
        rounding=None if rounding is None else measure_rounding(model, rounding),
    )


def _time_generations(
    generator: Generator, prompt_tokens: int, new_tokens: int, repeats: int
) -> tuple[list[Timing], list[float]]:
    """Generate repeatedly after one warm-up run; return the timings and memory bandwidths."""
    vocabulary = generator.model.get_input_embeddings().weight.shape[0]
    settings = Sampling(max_new_tokens=new_tokens)
    timings, memory_rates = [], []
    for repeat in range(repeats + 1):
        ids = [(7919 * (i + 1) + repeat) % vocabulary for i in range(prompt_tokens)]
        timing = Timing(prompt_tokens=prompt_tokens)
        for _ in generator.stream(ids, settings, timing):
            pass
        timings.append(timing)
        memory_rates.append(measure_memory_rate())
    return timings[1:], [rate for rate in memory_rates if rate is not None]


def measure_apart(measure: Callable[..., SpeedResult], *arguments: Any) -> SpeedResult:
    """Run a measurement in a separate process, so that its memory is measured separately.

    Args:
        measure: A module-level function.
        *arguments: Its arguments.

    Returns:
        Its result.

    Raises:
        ModelError: The process was killed, for example because memory ran out.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(measure, *arguments).result()
        except BrokenProcessPool as error:
            raise ModelError(
                "The measurement ended without a result: its process was killed, usually because "
                "memory ran out. Run halfbyte plan to see how much memory the model needs."
            ) from error


def measure_memory_rate() -> float | None:
    """Measure memory bandwidth with torch's threads, in bytes/s; None without the library."""
    functions = open_library().functions
    if functions is None:
        return None
    buffer = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    seconds: Sequence[float] = [
        _time(functions.hb_read, buffer.data_ptr(), buffer.nbytes, torch.get_num_threads())
        for _ in range(3)
    ]
    return buffer.nbytes / min(seconds)


def count_read_bytes(model: Any, generator: Generator) -> int:
    """Count the bytes of weights read per generated token.

    Args:
        model: The model.
        generator: The generator that runs it.

    Returns:
        Bytes of all weights, and of the experts that run per token. Embeddings count only if they
        are also the head, as a token reads a single row of them.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    apart = {id(tensor) for part in (head, embeddings) for tensor in part.parameters()}
    inside = {id(buffer) for buffer in head.buffers()}
    total: int = sum(p.nbytes for p in model.parameters() if id(p) not in apart)
    shares = _shares_of_experts(model)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            # A repacked weight includes scales and zeros.
            names = module.weight_names if module.is_repacked else (*module.weight_names, "scales")
            tensors = [module.get_buffer(buffer) for buffer in names]
            tensors += [] if module.offsets is None else [module.offsets]
            share = next((shares[part] for part in shares if name.startswith(part)), 1)
            total += int(share * sum(t.nbytes for t in tensors if id(t) not in inside))
    if generator.head is not None:
        return total + generator.head.read_bytes
    dense: int = sum(tensor.nbytes for tensor in [*head.parameters(), *head.buffers()])
    return total + dense


def _shares_of_experts(model: Any) -> dict[str, float]:
    """Return the fraction of experts that run per token, by the prefix of their names."""
    per_token = getattr(model.config.get_text_config(decoder=True), "num_experts_per_tok", None)
    return {
        f"{name}.": per_token / module.num_experts
        for name, module in model.named_modules()
        if isinstance(module, UnfusedExperts) and per_token
    }


def _time(function: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start
