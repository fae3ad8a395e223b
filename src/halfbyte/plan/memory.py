"""Bytes of a model that runs: weights, cache, activations and what the program itself takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from halfbyte.errors import ConfigError
from halfbyte.plan.shapes import ModelShapes

BITS = (2, 3, 4, 8, 16, 32)
CACHE_TYPES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "fp8": 1.0, "int8": 1.0}
"""Bytes of one number in the cache."""
SCALE_BYTES = 2
INDEX_BYTES = 4
"""Of ``g_idx``, which the standard format keeps per input."""
PREFILL_TOKENS = 8192
"""Prompt tokens that run at once, as servers limit them; a long prompt goes in pieces."""
GPU_PROGRAM_BYTES = 700_000_000
"""CUDA context, libraries and workspaces on the device: 0.5 to 0.9 GB on current cards."""
CPU_PROGRAM_BYTES = 380_000_000
"""Python, torch and Transformers in memory, as measured by ``halfbyte profile``."""
HIDDEN_COPIES = 4
"""Hidden-sized tensors alive at the widest point of a block: residual, norm and two products."""
INNER_COPIES = 4
"""Tensors of the MLP's width: gate, up, the activation, their product."""
NORM_COPIES = 3
"""Hidden-sized tensors in fp32, where norms are computed although the rest is in 16 bits."""


GROWTH_SHARE = 0.75
"""Of a growing cache that stays behind as pieces of its earlier sizes: between none and all of it
from run to run on glibc, by bench/measure_plan.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How the model is to be used."""

    bits: int = 4
    """Of the weights in the blocks; 16 and 32: not quantized."""
    group_size: int = 128
    """Inputs that share a scale; -1: all of a row."""
    context: int = 4096
    """Tokens per request, prompt and answer together."""
    requests: int = 1
    """At the same time."""
    cache_type: str = "float16"
    compute_bytes: int = 2
    """Of one activation, and of what is not quantized."""
    quantize_head: bool = False
    prefill_tokens: int = PREFILL_TOKENS
    program_bytes: int = GPU_PROGRAM_BYTES
    growing_cache: bool = False
    """The cache grows by being copied, as Transformers' does; servers keep it in pages."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"bits is {self.bits}; allowed are {', '.join(map(str, BITS))}.")
        if self.group_size < 1 and self.group_size != -1:
            raise ConfigError(f"group_size is {self.group_size}; it must be 1 or more, or -1.")
        for name in ("context", "requests", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.cache_type not in CACHE_TYPES:
            raise ConfigError(
                f"The cache type is '{self.cache_type}'; allowed are {', '.join(CACHE_TYPES)}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What a model takes under one load. All values in bytes."""

    codes: int
    """Weights of the blocks: packed codes, or 16 bits each."""
    grids: int
    """Scales, zeros and group indices."""
    embeddings: int
    """Token embeddings and the output layer, where it is another one."""
    other: int
    """Norms, biases, routers."""
    cache: int
    """Keys and values of all requests at their full length."""
    cache_per_token: int
    """While a request is shorter than every window."""
    activations: int
    program: int

    @property
    def weights(self) -> int:
        """Everything that is in the checkpoint."""
        return self.codes + self.grids + self.embeddings + self.other

    @property
    def total(self) -> int:
        """Everything together."""
        return self.weights + self.cache + self.activations + self.program

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON, in bytes."""
        return {**asdict(self), "weights": self.weights, "total": self.total}


def plan_memory(shapes: ModelShapes, load: Load) -> MemoryPlan:
    """Work out what a model takes under a load.

    Args:
        shapes: The model.
        load: How it is to be used.

    Returns:
        Bytes by part.
    """
    codes = grids = 0
    for matrix in shapes.linears:
        c, g = _matrix_bytes(matrix.out_features, matrix.in_features, load)
        codes += c * matrix.count
        grids += g * matrix.count
    embeddings = shapes.embedding_numbers * load.compute_bytes
    if shapes.head_numbers and load.quantize_head:
        c, g = _matrix_bytes(shapes.vocabulary, shapes.hidden, load)
        embeddings += c + g
    else:
        embeddings += shapes.head_numbers * load.compute_bytes
    return MemoryPlan(
        codes=codes,
        grids=grids,
        embeddings=embeddings,
        other=shapes.other_numbers * load.compute_bytes,
        cache=cache_bytes(shapes, load.context, load.cache_type) * load.requests,
        cache_per_token=cache_bytes(shapes, 1, load.cache_type),
        activations=activation_bytes(shapes, load),
        program=load.program_bytes,
    )


def _matrix_bytes(out_features: int, in_features: int, load: Load) -> tuple[int, int]:
    """Give bytes of codes, and of scales, zeros and group indices."""
    numbers = out_features * in_features
    if load.bits >= 16:
        return numbers * load.bits // 8, 0
    group = in_features if load.group_size == -1 else min(load.group_size, in_features)
    groups = -(-in_features // group)
    grid = groups * out_features * SCALE_BYTES + groups * out_features * load.bits // 8
    return numbers * load.bits // 8, grid + in_features * INDEX_BYTES


def cache_bytes(shapes: ModelShapes, tokens: int, cache_type: str) -> int:
    """Give the bytes that one request of this many tokens keeps.

    Args:
        shapes: The model.
        tokens: Prompt and answer.
        cache_type: A key of ``CACHE_TYPES``.

    Returns:
        Bytes; a sliding layer keeps no more than its window.
    """
    numbers = sum(
        layers.count * layers.numbers_per_token * min(tokens, layers.window or tokens)
        for layers in shapes.cache
    )
    return int(numbers * CACHE_TYPES[cache_type])


def activation_bytes(shapes: ModelShapes, load: Load) -> int:
    """Give the bytes of one forward pass beside weights and cache.

    Args:
        shapes: The model.
        load: How it is used.

    Returns:
        The tensors of the widest block for the prompt tokens that run at once, or the logits of
        the last token of every request in fp32, twice (as they are, and as probabilities); and
        the copy of a growing cache.
    """
    tokens = min(load.prefill_tokens, load.context * load.requests)
    block = load.compute_bytes * (HIDDEN_COPIES * shapes.hidden + INNER_COPIES * shapes.inner)
    if load.compute_bytes < 4:
        block += 4 * NORM_COPIES * shapes.hidden
    logits = 2 * 4 * load.requests * shapes.vocabulary
    growth = 0
    if load.growing_cache:
        whole = cache_bytes(shapes, load.context, load.cache_type) * load.requests
        growth = int(GROWTH_SHARE * whole)
    return max(tokens * block, logits) + growth


def bits_per_weight(shapes: ModelShapes, load: Load) -> float:
    """Give the mean bits of a quantized weight, with scales, zeros and indices."""
    plan = plan_memory(shapes, load)
    return 8 * (plan.codes + plan.grids) / max(shapes.linear_numbers, 1)
