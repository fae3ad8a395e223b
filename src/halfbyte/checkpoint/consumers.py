"""Programs that load GPTQ checkpoints, and what each requires of a linear.

Evidence: "ran" was tried with a small model, "read" was read in the consumer's source. Later
versions may lift a limit: vLLM's Marlin has begun to pad shapes that it rejected before.

Source:
    vLLM 0.32/0.33: ``quantization/utils/marlin_utils.py``, ``kernels/linear/mixed_precision``;
    GPTQModel 7: ``nn_modules/qlinear/torch.py``, ``models/loader.py``; llama.cpp's Q4_0 and Q8_0
    blocks of 32. The table in docs/concepts/checkpoint.md is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.quant_config import PER_CHANNEL

TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Consumer:
    """A program and its limits; sizes are per device, after tensor-parallel splitting."""

    name: str
    label: str
    evidence: str
    bits: tuple[int, ...] = (2, 3, 4, 8)
    symmetric_bits: tuple[int, ...] = ()
    """The bits for which it supports only symmetric grids."""
    in_multiple: int = 1
    out_multiple: int = 1
    group_sizes: tuple[int, ...] | None = None
    """Allowed values, -1 for one group per row; None if all are allowed."""
    group_multiple: int = 1
    supports_g_idx: bool = True
    """Whether ``g_idx`` may be out of order."""
    is_vllm: bool = False
    supports_offsets: bool = False
    trusts_config: bool = True
    """Whether it trusts the config where the tensors contradict it."""
    v1_zeros_from: str | None = None
    """The only tool, as in ``meta.quantizer``, whose asymmetric v1 checkpoints it accepts."""


def can_recenter(bits: int, block_bits: int, *, zero_low: int, zero_high: int) -> bool:
    """Check whether symmetric blocks can represent asymmetric codes exactly.

    Args:
        bits: Width of a code.
        block_bits: Width of a code of the blocks.
        zero_low: The smallest zero.
        zero_high: The largest zero.

    Returns:
        Whether every (code - zero) is in the signed range of ``block_bits`` bits.
    """
    middle = 1 << (block_bits - 1)
    return zero_high <= middle and (1 << bits) - 1 - zero_low < middle


_GGUF_BITS = {2: 4, 3: 4, 4: 4, 8: 8}
"""Width of the codes in GGUF blocks (Q4_0, Q8_0), by width of a GPTQ code."""

CONSUMERS = (
    Consumer(
        name="transformers",
        label="Transformers, with halfbyte imported",
        evidence="ran",
        supports_offsets=True,
        trusts_config=False,
    ),
    Consumer(
        name="gptqmodel",
        label="GPTQModel",
        evidence="ran",
        group_sizes=(PER_CHANNEL, 16, 32, 64, 128, 256, 512, 1024),
        v1_zeros_from="gptqmodel",
    ),
    Consumer(
        name="vllm-cpu",
        label="vLLM, CPU with AVX-512",
        evidence="ran",
        bits=(4,),
        symmetric_bits=(4,),
        in_multiple=32,
        out_multiple=32,
        # Its kernel supports more, but vLLM first checks every linear against Marlin's limits.
        group_sizes=(PER_CHANNEL, 32, 64, 128),
        supports_g_idx=False,
        is_vllm=True,
    ),
    Consumer(
        name="vllm-marlin",
        label="vLLM, Marlin (sm75+)",
        evidence="read",
        bits=(4, 8),
        symmetric_bits=(4, 8),
        in_multiple=128,
        out_multiple=64,
        group_sizes=(PER_CHANNEL, 32, 64, 128),
        supports_g_idx=False,
        is_vllm=True,
    ),
    Consumer(
        name="vllm-machete",
        label="vLLM, Machete (sm90)",
        evidence="read",
        bits=(4, 8),
        symmetric_bits=(4, 8),
        in_multiple=64,
        out_multiple=128,
        group_sizes=(PER_CHANNEL, 64, 128),
        supports_g_idx=False,
        is_vllm=True,
    ),
    Consumer(
        name="gguf",
        label="GGUF, bit-exact (Q4_0, Q8_0)",
        evidence="ran",
        bits=tuple(_GGUF_BITS),
        symmetric_bits=tuple(
            bits
            for bits, block_bits in _GGUF_BITS.items()
            if not can_recenter(bits, block_bits, zero_low=0, zero_high=2**bits - 1)
        ),
        in_multiple=32,
        group_multiple=32,
        supports_g_idx=False,
        trusts_config=False,
    ),
)

VLLM_REQUIRED_KEYS = ("bits", "group_size", "desc_act", "sym")

ROW_PARALLEL_NAMES = (
    "o_proj",
    "out_proj",
    "down_proj",
    "c_proj",
    "dense",
    "dense_4h_to_h",
    "fc2",
    "fc_out",
    "wo",
    "w2",
)
"""Last name parts of linears that vLLM splits along ``in``; only used for square ones, for which
the shape does not decide."""

REPLICATED_NAMES = ("q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj")
"""Linears that vLLM keeps whole on every device."""
