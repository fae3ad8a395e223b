"""Checks the machine code of the CUDA and Triton kernels, compiled ahead of time."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.compiled import (
    compile_add_norm,
    compile_attend,
    compile_kernel,
    compile_product,
    compile_route,
)
from tests.helpers.packed import make_linear

from halfbyte.kernels import cuda_linear, cuda_stream
from halfbyte.kernels.cuda_compiler import compile_source, read_source
from halfbyte.kernels.cuda_config import define_macros
from halfbyte.kernels.cuda_rows import RowsConfig
from halfbyte.kernels.cuda_stream import StreamConfig
from halfbyte.kernels.gpu_table import load_table
from halfbyte.kernels.triton_configs import RULES, TritonConfig
from halfbyte.kernels.triton_experts import MAX_TILE

triton = pytest.importorskip("triton")

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_120")
INTEGER = ("LOP3", "SHF", "PRMT", "I2F", "I2FP", "SEL")
BUDGET = 1.0
"""Integer instructions a weight in a step. At 2.5 an H100's integer units just keep up with its
memory (132 multiprocessors, 64 a clock at 1.75 GHz, 2 weights a byte at 3 TB/s)."""

SPILLS = {64: 24}
"""Spills that are allowed: at 64 rows, which this kernel takes only where there is no Triton, the
fastest measured thread block has 16 warps of 128 registers."""

FENCES = 2
"""Around the counting of who has added sums: before, for those who come later, and after."""

SPEC = replace(
    make_linear(dtype=torch.bfloat16).spec,
    in_features=4096,
    out_features=4096,
    group_size=128,
    device_type="cuda",
)


def list_shipped() -> list[TritonConfig]:
    """Every measured configuration; how the splits are cut changes little of the code."""
    measured = [TritonConfig(**config) for config in load_table("sm_90").triton.values()]
    return list(dict.fromkeys(replace(config, splits=min(config.splits, 2)) for config in measured))


def disassemble(kernel: Any, folder: Path) -> list[str]:
    """The instructions in order, with the suffixes that say what they do."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel if isinstance(kernel, bytes) else kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    text = subprocess.run(
        [str(tool), "-c", str(path)], capture_output=True, text=True, check=True
    ).stdout
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Zx0-9_.]+)", text, re.M)


def count(found: list[str], *names: str) -> int:
    return sum(name.split(".")[0] in names for name in found)


def find_loop(found: list[str]) -> list[str]:
    """Return one step of 64 inputs, from the first read of staged codes to the last product."""
    products = [place for place, name in enumerate(found) if name.startswith("HMMA")]
    reads = [place for place, name in enumerate(found) if re.match(r"LDS\..*128|LDSM", name)]
    return found[min(reads) : products[-1] + 1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [1, 16, 32, 64])
def test_cuda_kernel(architecture, rows, tmp_path, nvrtc):
    config = cuda_linear.choose_config(architecture, rows, SPEC, torch.float16)
    macros = define_macros(config, SPEC, torch.float16)
    cubin = compile_source(read_source("multiply.cu"), macros, architecture)
    found = disassemble(cubin, tmp_path)
    assert count(found, "HMMA") == 4 * config.tiles * config.row_tiles
    assert any(name.startswith("LDGSTS") and "128" in name for name in found)
    assert any(name.startswith("LDS") and "128" in name for name in found)
    assert count(found, "LDL", "STL") <= SPILLS.get(rows, 0), "registers are spilled"
    assert found.count("MEMBAR.SC.GPU") == FENCES
    assert count(find_loop(found), *INTEGER) <= BUDGET * config.tiles * 32
    if architecture == "sm_90":
        assert count(found, "ACQBULK", "PREEXIT") == 2, "no early start of the next launch"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_kernel_of_every_width_spills_nothing(bits, dtype, tmp_path, nvrtc):
    spec = replace(SPEC, bits=bits, dtype=dtype, symmetric=False, group_size=32)
    config = cuda_linear.choose_config("sm_90", 1, spec, torch.float16)
    macros = define_macros(config, spec, torch.float16)
    found = disassemble(compile_source(read_source("multiply.cu"), macros, "sm_90"), tmp_path)
    assert count(found, "HMMA") == 4 * config.tiles
    assert count(found, "LDL", "STL") == 0


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (StreamConfig(row_tiles=1, tiles=2, warps_out=1, warps_in=16, stages=5), 110),
        (StreamConfig(row_tiles=1, tiles=4, warps_out=1, warps_in=8, stages=3, blocks=2), 190),
        (StreamConfig(row_tiles=2, tiles=2, warps_out=4, warps_in=4, stages=4), 135),
    ],
)
def test_cuda_kernel_that_copies_in_bulk(config, most, tmp_path, nvrtc):
    macros = define_macros(config, SPEC, torch.bfloat16)
    found = disassemble(
        compile_source(read_source("multiply_stream.cu"), macros, "sm_90"), tmp_path
    )
    # Four products of a tile and eight rows; four more give the sums of x.
    assert count(found, "HMMA") == 4 * (config.tiles + 1) * config.row_tiles
    assert count(found, "LDL", "STL") == 0, "registers are spilled"
    assert count(found, "UTMALDG") > 0, "nothing is copied in bulk"
    assert count(found, "LDGSTS") == 0, "something is not copied in bulk"
    assert count(found, "HFMA2") == 0, "zeros are taken off one by one"
    assert count(found, "ACQBULK", "PREEXIT") >= 3, "no early start of the next launch"
    assert found.count("MEMBAR.SC.GPU") == FENCES
    copies = next(place for place, name in enumerate(found) if name.startswith("UTMALDG"))
    assert not [name for name in found[:copies] if re.match(r"MEMBAR.*GPU", name)]
    sums = [place for place, name in enumerate(found) if re.match(r"LDG.*128", name)]
    assert len(sums) == 2 * min(config.tiles * config.warps_out * config.row_tiles, 4)
    assert count(found[sums[0] : sums[-1]], "FADD") == 0, "sums are read one after the other"
    products = [place for place, name in enumerate(found) if name.startswith("HMMA")]
    loop = found[next(i for i, name in enumerate(found) if name == "LDSM.16.M88.4") : products[-1]]
    assert count(loop, *INTEGER) <= BUDGET * config.tiles * 32
    assert len(loop) <= most, "at one row it is instructions that take the time"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bulk_copies_of_every_width_spill_nothing(bits, dtype, tmp_path, nvrtc):
    spec = replace(SPEC, bits=bits, dtype=dtype, symmetric=False, group_size=32)
    config = StreamConfig(row_tiles=1, tiles=2, warps_out=1, warps_in=16, stages=4)
    config = cuda_stream.fit_memory(config, spec, torch.float32)
    macros = define_macros(config, spec, torch.float32)
    found = disassemble(
        compile_source(read_source("multiply_stream.cu"), macros, "sm_90"), tmp_path
    )
    assert count(found, "LDL", "STL") == 0


@pytest.mark.parametrize("rows", [16, 64, 128, 256])
def test_cuda_kernel_for_many_rows(rows, tmp_path, nvrtc):
    tiles = 1 if rows == 256 else 2
    config = RowsConfig(rows=rows, tiles=tiles, warpgroups=2, stages=5)
    macros = define_macros(config, SPEC, torch.bfloat16)
    found = disassemble(compile_source(read_source("multiply_rows.cu"), macros, "sm_90a"), tmp_path)
    products = [place for place, name in enumerate(found) if name.startswith("HGMMA")]
    assert len(products) == 4 * tiles
    assert all(found[place].startswith(f"HGMMA.64x{rows}x16.F32.BF16") for place in products)
    assert count(found, "LDL", "STL") == 0, "registers are spilled"
    assert count(found, "UBLKCP", "UTMALDG") > 0, "nothing is copied in bulk"
    assert count(found, "USETMAXREG") == 2
    loop = found[products[0] : products[-1]]
    # Three of the four 16-input parts of a step are decoded between its products.
    assert count(loop, *INTEGER) <= BUDGET * tiles * 24
    assert any(re.match(r"LDS\..*128", name) for name in found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("config", [TritonConfig(64, 16, 1, 4, 4), TritonConfig(128, 64, 1, 8, 4)])
def test_triton_kernel(architecture, zeros, config, tmp_path):
    found = disassemble(compile_product(architecture, config, HAS_ZEROS=zeros), tmp_path)
    product = "HGMMA" if architecture == "sm_90" else "HMMA"
    assert count(found, product) > 0
    assert any(name.startswith("LDGSTS") and "128" in name for name in found)
    assert count(found, "LDL", "STL") == 0, "registers are spilled"
    assert count(found, "I2F", "I2FP") == 0, "codes are converted, not set into a mantissa"
    if architecture == "sm_90":
        weights = config.block_out * 64 // (32 * config.warps)
        # Over the whole kernel: what stands outside the loop counts too.
        assert count(found, *INTEGER) <= 3.0 * weights
        # The layout matches the tensor core: no code passes through shared memory twice.
        assert count(found, "STS") <= 2


def test_triton_kernel_with_two_groups_in_a_step(tmp_path):
    config = TritonConfig(64, 16, 2, 4, 5)
    found = disassemble(compile_product("sm_90", config, HAS_ZEROS=False, GROUP_SIZE=32), tmp_path)
    assert count(found, "HGMMA") == 4
    assert count(found, "LDL", "STL", "I2F", "I2FP") == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [16, 32, 64])
def test_triton_kernel_of_experts(architecture, rows, tmp_path):
    rule = RULES[rows]
    config = TritonConfig(rule.block_out, rule.block_rows, 2, rule.warps, rule.stages)
    alone = disassemble(compile_product(architecture, config), tmp_path)
    found = disassemble(compile_product(architecture, config, experts=True), tmp_path)
    # On sm_80 one register is kept in memory during the loop.
    steps = found if architecture == "sm_90" else find_loop(found)
    assert count(steps, "LDL", "STL") == 0, "registers are spilled"
    # Addresses from a table are as good as addresses from arguments.
    assert any(name.startswith("LDGSTS") and "128" in name for name in found)
    for names in (("HGMMA", "HMMA"), ("LDGSTS",), ("STS",)):
        assert count(found, *names) == count(alone, *names)
    if architecture == "sm_90":
        assert count(found, "ACQBULK", "PREEXIT") == 2, "no early start of the next launch"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_around_the_experts(architecture, tmp_path):
    from halfbyte.kernels import triton_expert_kernels as kernels

    for tokens, experts in ((1, 512), (16, 256), (MAX_TILE // 64, 64)):
        found = disassemble(compile_route(architecture, tokens, experts), tmp_path)
        # The largest tiles barely fit; the kernel runs once per layer.
        assert count(found, "LDL", "STL") <= len(found) // 100, "registers are spilled"
    early = architecture == "sm_90"
    found = disassemble(
        compile_kernel(
            kernels.combine_kernel,
            {"PER_TOKEN": 8, "BLOCK": 512, "EARLY": early},
            dict.fromkeys(("parts", "weights", "result"), "*bf16")
            | {"places": "*i32", "width": "i32"},
            architecture,
            num_warps=4,
            **({"launch_pdl": True} if early else {}),
        ),
        tmp_path,
    )
    assert count(found, "LDL", "STL") == 0
    assert all("64" in name or "128" in name for name in found if name.startswith("STG"))


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("config", list_shipped(), ids=str)
def test_every_shipped_kernel_fits_the_gpu(config, bits, group_size, tmp_path):
    compiled = compile_product("sm_90", config, GROUP_SIZE=group_size, BITS=bits)
    found = disassemble(compiled, tmp_path)
    assert count(found, "HGMMA") > 0
    # Two groups in a step hold more at a time: the widest tile of four warps spills a little then.
    widest = config == TritonConfig(128, 64, 1, 4, 4) and group_size == 32
    assert count(found, "LDL", "STL") <= (8 if widest else 0)


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_of_a_decode_step(architecture, page, tmp_path):
    from halfbyte.kernels import triton_decode_kernels as kernels

    early = architecture == "sm_90"
    options = {"num_stages": 3} | ({"launch_pdl": True} if early else {})
    norm = compile_add_norm(architecture, **options)
    gate = compile_kernel(
        kernels.gate_kernel,
        {"BLOCK": 256, "EARLY": early},
        {"gate_up": "*bf16", "result": "*bf16", "width": "i32"},
        architecture,
        num_warps=2,
        **options,
    )
    attend = compile_attend(architecture, page=page, block=32, num_warps=4, **options)
    for kernel in (norm, gate, attend):
        found = disassemble(kernel, tmp_path)
        assert count(found, "LDL", "STL") == 0, "registers are spilled"
        if early:
            assert count(found, "ACQBULK", "PREEXIT") == 2, "no early start of the next launch"
    for kernel in (norm, gate):
        wide = [name for name in disassemble(kernel, tmp_path) if name.startswith("LDG")]
        assert wide
        assert all("128" in name or "64" in name for name in wide)
    assert count(found, "HMMA") > 0
    # Keys and values are loaded while the previous ones are multiplied.
    assert any(name.startswith("LDGSTS") and "128" in name for name in found)
