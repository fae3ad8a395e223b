"""Compiles the Triton kernels ahead of time for AMD's GPUs, and checks their assembly."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from tests.helpers.compiled import (
    compile_add_norm,
    compile_attend,
    compile_kernel,
    compile_product,
    compile_route,
)

from halfbyte.kernels.triton_configs import choose_config
from halfbyte.kernels.triton_decode import AMD_BLOCK_POSITIONS

pytest.importorskip("triton")

ARCHITECTURES = ("gfx942", "gfx1100", "gfx1201")
"""MI300, Radeon RX 7900 and RX 9070."""

SHARED_LIMIT = 2**16
"""Bytes of shared memory of a program."""


def check_fits(compiled: Any, max_spills: int = 0) -> None:
    spills = re.search(r"vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])
    assert spills
    assert int(spills[1]) <= max_spills, "registers are spilled"
    assert compiled.metadata.shared <= SHARED_LIMIT


def compile_chosen(architecture: str, rows: int, **changes: Any) -> Any:
    config = replace(choose_config(architecture, 96, 4096, 4096, rows), splits=2)
    return compile_product(architecture, config, **changes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [16, 128])
def test_products_use_matrix_units(architecture, rows):
    compiled = compile_chosen(architecture, rows, experts=True, HAS_ORDER=True)
    check_fits(compiled)
    unit = r"v_mfma_f32\w*bf16" if architecture == "gfx942" else r"v_wmma_f32\w*bf16"
    assert len(re.findall(unit, compiled.asm["amdgcn"])) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
def test_registers_of_every_product_fit(architecture, rows, bits, group_size):
    layer = {"BITS": bits, "GROUP_SIZE": group_size}
    check_fits(compile_chosen(architecture, rows, **layer, HAS_ZEROS=False))
    # Two zeros in a step, and codes from many words: too much for the 256 registers of RDNA 3.
    widest = architecture == "gfx1100" and rows >= 64 and bits < 4 and group_size == 32
    compiled = compile_chosen(architecture, rows, **layer, HAS_ORDER=True)
    check_fits(compiled, max_spills=80 if widest else 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_kernels(architecture):
    from halfbyte.kernels.triton_kernels import dequantize_kernel

    check_fits(compile_add_norm(architecture))
    for shape in ((128, 8, False), (128, 4, True), (64, 8, False)):
        width, key_heads, has_norms = shape
        compiled = compile_attend(
            architecture,
            page=16,
            block=AMD_BLOCK_POSITIONS,
            width=width,
            key_heads=key_heads,
            has_norms=has_norms,
            num_warps=8,
            num_stages=2,
        )
        check_fits(compiled)
    check_fits(compile_route(architecture, 16, 256))
    compiled = compile_kernel(
        dequantize_kernel,
        {"BITS": 4, "GROUP_SIZE": 128, "HAS_ZEROS": True, "HAS_ORDER": False, "BLOCK_OUT": 64}
        | {"order": None},
        {"codes": "*i32", "zeros": "*u8", "scales": "*fp16", "result": "*bf16"}
        | {"in_features": "i32", "out_features": "i32"},
        architecture,
        num_warps=4,
    )
    check_fits(compiled)
