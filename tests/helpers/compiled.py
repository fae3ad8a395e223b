"""Compiles Triton kernels ahead of time, for GPUs that this machine does not have."""

from __future__ import annotations

from typing import Any

from halfbyte.kernels.triton_configs import TritonConfig, next_power_of_two
from halfbyte.kernels.triton_experts import count_row_blocks

ROUTED = ("addresses", "block_experts", "block_counts", "sources")
"""Arguments of a product of several experts."""


def compile_kernel(
    kernel: Any,
    constants: dict[str, Any],
    types: dict[str, str],
    architecture: str,
    *,
    unaligned: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """Compile a kernel for an architecture such as ``sm_90`` or ``gfx942``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    kinds = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [
        index
        for index, name in enumerate(names)
        if kinds[name] not in ("constexpr", "fp32") and name not in unaligned
    ]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(kernel, kinds, constexprs=constants, attrs=attributes)
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)
    return triton.compile(source, target=target, options=options)


def compile_product(architecture: str, config: TritonConfig, **changes: Any) -> Any:
    """Compile the product of packed codes: 4 bits, groups of 128, bf16, unless changed.

    ``experts=True``: each block of rows is multiplied by the weight of its expert.
    """
    from halfbyte.kernels.triton_kernels import multiply_kernel

    experts = changes.pop("experts", False)
    early = experts and architecture == "sm_90"
    constants: dict[str, Any] = {
        "BITS": 4,
        "GROUP_SIZE": 128,
        "HAS_ZEROS": True,
        "HAS_ORDER": False,
        "HAS_BIAS": False,
        "HAS_EXPERTS": experts,
        "HAS_SOURCES": experts,
        "FAST": architecture.startswith("sm_"),
        "BLOCK_OUT": config.block_out,
        "BLOCK_ROWS": config.block_rows,
        "SPLITS": config.splits,
        "STAGES": config.stages,
        "EARLY": early,
        "bias": None,
    } | changes
    left_out = {
        "zeros": not constants["HAS_ZEROS"],
        "order": not constants["HAS_ORDER"],
        **dict.fromkeys(("workspace", "arrivals"), config.splits == 1),
        **dict.fromkeys(ROUTED, not experts),
    }
    constants |= {name: None for name, is_left_out in left_out.items() if is_left_out}
    types = (
        dict.fromkeys(("x", "result"), "*bf16")
        | dict.fromkeys(("codes", "order", "arrivals", *ROUTED), "*i32")
        | {"addresses": "*i64", "zeros": "*u8", "scales": "*fp16", "workspace": "*fp32"}
        | dict.fromkeys(("rows", "in_features", "out_features", "steps_each"), "i32")
    )
    return compile_kernel(
        multiply_kernel,
        constants,
        types,
        architecture,
        unaligned=("rows", "steps_each"),
        num_warps=config.warps,
        num_stages=config.stages,
        **({"launch_pdl": True} if early else {}),
    )


def compile_route(architecture: str, tokens: int, experts: int) -> Any:
    """Compile the kernel that sorts tokens by expert, eight per token."""
    from halfbyte.kernels.triton_expert_kernels import route_kernel

    numbers = ("tokens", "num_experts", "row_blocks")
    row_blocks = count_row_blocks(8 * tokens, experts, 16)
    sizes = {"TOKENS": tokens, "EXPERTS": experts, "BLOCKS": next_power_of_two(row_blocks)}
    return compile_kernel(
        route_kernel,
        {"PER_TOKEN": 8, "BLOCK_ROWS": 16} | sizes,
        dict.fromkeys(("block_experts", "block_counts", "sources", "places"), "*i32")
        | dict.fromkeys(numbers, "i32")
        | {"experts": "*i64"},
        architecture,
        unaligned=numbers,
        num_warps=8,
    )


def compile_add_norm(architecture: str, **options: Any) -> Any:
    """Compile the norm of a decode step."""
    from halfbyte.kernels.triton_decode_kernels import add_norm_kernel

    return compile_kernel(
        add_norm_kernel,
        {"HAS_DELTA": True, "BLOCK": 4096, "EARLY": "launch_pdl" in options},
        dict.fromkeys(("x", "delta", "weight", "total", "result"), "*bf16")
        | {"width": "i32", "epsilon": "fp32"},
        architecture,
        num_warps=8,
        **options,
    )


def compile_attend(
    architecture: str,
    *,
    page: int,
    block: int,
    width: int = 128,
    key_heads: int = 8,
    has_norms: bool = False,
    **options: Any,
) -> Any:
    """Compile the attention of a decode step."""
    from halfbyte.kernels.triton_decode_kernels import attend_kernel

    constants: dict[str, Any] = {
        "HEADS": 32,
        "KEY_HEADS": key_heads,
        "WIDTH": width,
        "ROTARY": width,
        "HAS_NORMS": has_norms,
        "ROWS": 16,
        "BLOCK": block,
        "BLOCK_WIDTH": width,
        "PAGE": page,
        "SPLITS": 16,
        "EARLY": "launch_pdl" in options,
    }
    constants |= {} if has_norms else {"q_norm": None, "k_norm": None}
    names = ("qkv", "cosines", "sines", "keys", "values", "result", "q_norm", "k_norm")
    return compile_kernel(
        attend_kernel,
        constants,
        dict.fromkeys(names, "*bf16")
        | {"positions": "*i64", "tables": "*i32", "arrivals": "*i32"}
        | {"sums": "*fp32", "sizes": "*fp32", "scale": "fp32", "epsilon": "fp32"}
        | {"page_tokens": "i32", "table_pages": "i32"},
        architecture,
        unaligned=("page_tokens", "table_pages"),
        **options,
    )
