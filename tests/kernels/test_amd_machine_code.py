"""Compiles the Triton kernels ahead of time for AMD's GPUs, and checks their assembly."""

from __future__ import annotations

import re
from typing import Any

import pytest

from halfbyte.kernels import triton_decode, triton_decode_kernels, triton_expert_kernels
from halfbyte.kernels.triton_configs import choose_config
from halfbyte.kernels.triton_kernels import dequantize_kernel, multiply_kernel

triton = pytest.importorskip("triton")

ARCHITECTURES = ("gfx942", "gfx1100", "gfx1201")
"""MI300, Radeon RX 7900 and RX 9070."""

SHARED_LIMIT = 2**16
"""Bytes of shared memory of a program."""


def compile_kernel(
    kernel: Any,
    constants: dict[str, Any],
    types: dict[str, str],
    architecture: str,
    *,
    unaligned: tuple[str, ...] = (),
    max_spills: int = 0,
    **options: int,
) -> str:
    """Return the assembly, after checking that registers and shared memory fit."""
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
    lanes = 64 if architecture.startswith("gfx9") else 32
    compiled = triton.compile(source, target=GPUTarget("hip", architecture, lanes), options=options)
    text: str = compiled.asm["amdgcn"]
    spills = re.search(r"vgpr_spill_count:\s+(\d+)", text)
    assert spills
    assert int(spills[1]) <= max_spills, "registers are spilled"
    assert compiled.metadata.shared <= SHARED_LIMIT
    return text


def compile_product(architecture: str, rows: int, *, max_spills: int = 0, **constants: Any) -> str:
    config = choose_config(architecture, 96, 4096, 4096, rows)
    constants = {
        "BITS": 4,
        "GROUP_SIZE": 128,
        "HAS_ZEROS": True,
        "HAS_ORDER": False,
        "HAS_BIAS": False,
        "HAS_EXPERTS": False,
        "HAS_SOURCES": False,
        "FAST": False,
        "BLOCK_OUT": config.block_out,
        "BLOCK_ROWS": config.block_rows,
        "SPLITS": 2,
        "STAGES": config.stages,
        "EARLY": False,
        "bias": None,
    } | constants
    routed = ("addresses", "block_experts", "block_counts", "sources")
    constants |= {} if constants["HAS_ZEROS"] else {"zeros": None}
    constants |= {} if constants["HAS_ORDER"] else {"order": None}
    constants |= {} if constants["HAS_EXPERTS"] else dict.fromkeys(routed)
    types = (
        dict.fromkeys(("x", "result"), "*bf16")
        | dict.fromkeys(("codes", "order", "arrivals", *routed), "*i32")
        | {"addresses": "*i64", "zeros": "*u8", "scales": "*fp16", "workspace": "*fp32"}
        | dict.fromkeys(("rows", "in_features", "out_features", "steps_each"), "i32")
    )
    return compile_kernel(
        multiply_kernel,
        constants,
        types,
        architecture,
        unaligned=("rows", "steps_each"),
        max_spills=max_spills,
        num_warps=config.warps,
        num_stages=config.stages,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [16, 128])
def test_products_use_matrix_units(architecture, rows):
    text = compile_product(architecture, rows, HAS_EXPERTS=True, HAS_SOURCES=True, HAS_ORDER=True)
    unit = r"v_mfma_f32\w*bf16" if architecture == "gfx942" else r"v_wmma_f32\w*bf16"
    assert len(re.findall(unit, text)) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
def test_registers_of_every_product_fit(architecture, rows, bits, group_size):
    layer = {"BITS": bits, "GROUP_SIZE": group_size}
    compile_product(architecture, rows, **layer, HAS_ZEROS=False)
    # Two zeros in a step, and codes from many words: too much for the 256 registers of RDNA 3.
    widest = architecture == "gfx1100" and rows >= 64 and bits < 4 and group_size == 32
    compile_product(architecture, rows, **layer, HAS_ORDER=True, max_spills=80 if widest else 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_of_a_decode_step(architecture):
    kernels = triton_decode_kernels
    compile_kernel(
        kernels.add_norm_kernel,
        {"HAS_DELTA": True, "BLOCK": 4096, "EARLY": False},
        dict.fromkeys(("x", "delta", "weight", "total", "result"), "*bf16")
        | {"width": "i32", "epsilon": "fp32"},
        architecture,
        num_warps=8,
    )
    for width, key_heads, has_norms in ((128, 8, False), (128, 4, True), (64, 8, False)):
        constants: dict[str, Any] = {
            "HEADS": 32,
            "KEY_HEADS": key_heads,
            "WIDTH": width,
            "ROTARY": width,
            "HAS_NORMS": has_norms,
            "ROWS": 16,
            "BLOCK": triton_decode.AMD_BLOCK_POSITIONS,
            "BLOCK_WIDTH": width,
            "PAGE": 16,
            "SPLITS": 16,
            "EARLY": False,
        }
        constants |= {} if has_norms else {"q_norm": None, "k_norm": None}
        names = ("qkv", "cosines", "sines", "keys", "values", "result", "q_norm", "k_norm")
        compile_kernel(
            kernels.attend_kernel,
            constants,
            dict.fromkeys(names, "*bf16")
            | {"positions": "*i64", "tables": "*i32", "arrivals": "*i32"}
            | {"sums": "*fp32", "sizes": "*fp32", "scale": "fp32", "epsilon": "fp32"}
            | {"page_tokens": "i32", "table_pages": "i32"},
            architecture,
            unaligned=("page_tokens", "table_pages"),
            num_warps=8,
            num_stages=2,
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_kernels(architecture):
    compile_kernel(
        dequantize_kernel,
        {"BITS": 4, "GROUP_SIZE": 128, "HAS_ZEROS": True, "HAS_ORDER": False, "BLOCK_OUT": 64}
        | {"order": None},
        {"codes": "*i32", "zeros": "*u8", "scales": "*fp16", "result": "*bf16"}
        | {"in_features": "i32", "out_features": "i32"},
        architecture,
        num_warps=4,
    )
    sizes = {"PER_TOKEN": 8, "BLOCK_ROWS": 16, "TOKENS": 16, "EXPERTS": 256, "BLOCKS": 128}
    numbers = ("tokens", "num_experts", "row_blocks")
    compile_kernel(
        triton_expert_kernels.route_kernel,
        sizes,
        dict.fromkeys(("block_experts", "block_counts", "sources", "places"), "*i32")
        | dict.fromkeys(numbers, "i32")
        | {"experts": "*i64"},
        architecture,
        unaligned=numbers,
        num_warps=8,
    )
