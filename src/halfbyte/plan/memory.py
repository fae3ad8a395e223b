"""Memory of a running model: weights, KV cache, activations and the program itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from halfbyte.errors import ConfigError
from halfbyte.plan.shapes import ModelShapes

BITS = (2, 3, 4, 8, 16, 32)
CACHE_TYPES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "fp8": 1.0, "int8": 1.0}
"""Bytes per element of the KV cache."""
SCALE_BYTES = 2
INDEX_BYTES = 4
"""Bytes per element of ``g_idx``, which the standard format stores for each input feature."""
PREFILL_TOKENS = 8192
"""Tokens per prefill step, a usual limit of servers; longer prompts are prefilled in chunks."""
GPU_PROGRAM_BYTES = 700_000_000
"""CUDA context, libraries and workspaces on the device: 0.5 to 0.9 GB on current GPUs."""
CPU_PROGRAM_BYTES = 380_000_000
"""Python, torch and Transformers in memory, as measured by ``halfbyte profile``."""
HIDDEN_COPIES = 4
"""Hidden-sized tensors alive at the widest point of a block: residual, norm and two products."""
INNER_COPIES = 4
"""Tensors of the MLP's width: gate, up, the activation, their product."""
NORM_COPIES = 3
"""Hidden-sized tensors in fp32, in which norms are computed even if the rest is in 16 bits."""
GROWTH_SHARE = 0.75
"""Fraction of a growing cache that the allocator retains from its earlier, smaller copies. On glibc
it varies between 0 and 1 from run to run (bench/measure_plan.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The workload to plan for."""

    bits: int = 4
    """Bits per weight in the blocks; 16 and 32 mean not quantized."""
    group_size: int = 128
    """Input features that share a scale; -1 for one group per row."""
    context: int = 4096
    """Tokens per request, prompt and completion together."""
    requests: int = 1
    """Concurrent requests."""
    cache_type: str = "float16"
    compute_bytes: int = 2
    """Bytes per element of activations and of weights that are not quantized."""
    quantize_head: bool = False
    prefill_tokens: int = PREFILL_TOKENS
    program_bytes: int = GPU_PROGRAM_BYTES
    growing_cache: bool = False
    """Whether the cache grows by reallocation, as Transformers' does; servers use a paged cache."""

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
                f"cache_type is '{self.cache_type}'; allowed are {', '.join(CACHE_TYPES)}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Memory of a model under a given load, by part. All values in bytes."""

    codes: int
    """Weights of the blocks: packed codes, or unquantized values."""
    grids: int
    """Scales, zeros and group indices."""
    embeddings: int
    """Token embeddings and, unless tied to them, the output layer."""
    other: int
    """Norms, biases, routers."""
    cache: int
    """KV cache of all requests at full length."""
    cache_per_token: int
    """KV cache of one token, while a request is shorter than every sliding window."""
    activations: int
    program: int

    @property
    def weights(self) -> int:
        """All tensors in the checkpoint."""
        return self.codes + self.grids + self.embeddings + self.other

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.weights + self.cache + self.activations + self.program

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable values, in bytes."""
        return {**asdict(self), "weights": self.weights, "total": self.total}


def plan_memory(shapes: ModelShapes, load: Load) -> MemoryPlan:
    """Estimate the memory of a model under a load.

    Args:
        shapes: The model.
        load: The workload.

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
    """Return the bytes of the codes, and of scales, zeros and group indices."""
    numbers = out_features * in_features
    if load.bits >= 16:
        return numbers * load.bits // 8, 0
    group = in_features if load.group_size == -1 else min(load.group_size, in_features)
    groups = -(-in_features // group)
    grid = groups * out_features * SCALE_BYTES + groups * out_features * load.bits // 8
    return numbers * load.bits // 8, grid + in_features * INDEX_BYTES


def cache_bytes(shapes: ModelShapes, tokens: int, cache_type: str) -> int:
    """Return the KV cache size of one request.

    Args:
        shapes: The model.
        tokens: Prompt and completion.
        cache_type: A key of ``CACHE_TYPES``.

    Returns:
        Bytes; sliding-window layers keep at most their window.
    """
    numbers = sum(
        layers.count * layers.numbers_per_token * min(tokens, layers.window or tokens)
        for layers in shapes.cache
    )
    return int(numbers * CACHE_TYPES[cache_type])


def activation_bytes(shapes: ModelShapes, load: Load) -> int:
    """Return the memory of one forward pass besides weights and cache.

    Args:
        shapes: The model.
        load: The workload.

    Returns:
        Bytes: the larger of the widest block's tensors for one prefill step and two fp32 copies
        (logits, probabilities) of the last token's logits of every request; plus what a growing
        cache leaves behind.
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
    """Return the mean bits per quantized weight, including scales, zeros and indices."""
    plan = plan_memory(shapes, load)
    return 8 * (plan.codes + plan.grids) / max(shapes.linear_numbers, 1)
