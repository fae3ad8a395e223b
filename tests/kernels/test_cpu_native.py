"""The compiled kernel on every instruction set of this machine."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tests.helpers.native import ISAS, LIBRARY, NEEDS_LIBRARY
from tests.helpers.packed import KINDS, make_linear, make_linear_of

from halfbyte.errors import ConfigError
from halfbyte.kernels import native_library
from halfbyte.kernels.cpu_native import ROWS_LIMIT, CpuNative
from halfbyte.kernels.native_library import check_status, open_library

pytestmark = NEEDS_LIBRARY
LAYERS = [
    (4, 64, 64, 32),
    (4, 576, 192, 128),  # ragged last group
    (4, 144, 40, 16),  # channels that fill no block
    (4, 136, 8, 136),  # one group for the whole row
    (4, 1160, 40, 232),  # groups across chunks of 512 columns
    (3, 1056, 32, 96),
    (8, 100, 24, 20),
    (3, 288, 96, 96),
    (2, 144, 48, 16),
]
"""bits, in, out, group size."""


def run(linear, x, bias=None):
    kernel = CpuNative()
    assert kernel.find_mismatch(linear.spec) is None
    operands = replace(linear.stored, weight=kernel.prepare(linear.stored, linear.spec))
    return kernel, operands, kernel.apply(x, operands, bias, linear.spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_instruction_set_is_within_the_bound(isa, layer, kind, dtype):
    linear = make_linear_of(layer, kind, dtype)
    _, in_features, out_features, _ = layer
    for rows in (1, 2, 3, 7, 8, 13, ROWS_LIMIT + 5):
        x = torch.randn(rows, in_features).to(dtype)
        bias = torch.randn(out_features).to(dtype)
        kernel, operands, found = run(linear, x, bias)
        exact = x.double() @ linear.weight.t() + bias.double()
        size = x.double().abs() @ linear.weight.abs().t() + bias.double().abs()
        assert ((found.double() - exact).abs() <= kernel.error_bound(linear.spec) * size).all()
        assert torch.equal(kernel.restore(operands, linear.spec), linear.stored.weight[0])


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_keep_their_own_precision(isa, scale_dtype):
    linear = make_linear(scale_dtype=scale_dtype)
    # One input column at a time: what comes out is the weight itself.
    found = run(linear, torch.eye(128))[2]
    assert torch.equal(found.double(), linear.weight.t().float().double())


def test_subnormal_float16_scales_count(isa):
    linear = make_linear()
    scales = torch.full_like(linear.stored.scales, 2**-24)
    stored = replace(linear.stored, scales=scales)
    found = run(replace(linear, stored=stored), torch.eye(128))[2]
    codes = linear.weight / linear.stored.scales.double().t().repeat_interleave(32, 1)
    assert torch.equal(found.double(), codes.round().t() * 2**-24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_not_finite_stays_so_in_its_row_only(isa, dtype, symmetric):
    linear = make_linear(symmetric=symmetric, dtype=dtype)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(3, 128).to(dtype)
        x[1, 70] = bad
        found = run(linear, x)[2]
        # A weight of exactly 0 turns infinity into not-a-number; none stays finite.
        assert not torch.isfinite(found[1]).any()
        assert torch.isfinite(found[[0, 2]]).all()


def test_float16_results_overflow_to_infinity_and_keep_subnormals(isa):
    linear = make_linear(dtype=torch.float16)
    for size in (3e4, 1e-6):
        x = (torch.randn(1, 128) * size).clamp(-6e4, 6e4).half()
        found = run(linear, x)[2]
        exact = (x.double() @ linear.weight.t()).half()
        assert torch.equal(torch.isinf(found), torch.isinf(exact))
        close = found.isinf() | ((found.double() - exact.double()).abs() <= 2e-3 * exact.abs())
        assert (close | ((found.double() - exact.double()).abs() <= 2**-24)).all()


def test_dequantized_tiles_are_the_weight_rounded_once(isa):
    linear = make_linear(in_features=160, out_features=104, group_size=80, symmetric=False)
    kernel = CpuNative()
    (packed,) = kernel.prepare(linear.stored, linear.spec)
    for code, dtype in ((0, torch.float32), (1, torch.bfloat16)):
        tile = torch.empty(160, 104 - 32, dtype=dtype)
        status = LIBRARY.functions.hb_dequantize(
            packed.data_ptr(), 32, 104, code, tile.data_ptr(), 2
        )
        assert status == 0
        assert torch.equal(tile, linear.weight[32:].t().to(dtype))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device_type": "cuda"}, "runs on cpu, not on cuda"),
        ({"group_size": 20}, "needs group_size a multiple of 8 at 4 bits"),
        ({"bits": 3, "group_size": 48}, "needs group_size a multiple of 32 at 3 bits"),
        ({"dtype": torch.float64}, "supports float32, bfloat16 and float16, not torch.float64"),
    ],
)
def test_says_why_it_cannot_run_a_layer(change, reason):
    assert CpuNative().find_mismatch(replace(make_linear().spec, **change)) == reason


def test_bytes_that_are_no_packed_weight_are_refused():
    garbage = torch.zeros(4096, dtype=torch.uint8)
    x = torch.zeros(4096)
    functions = LIBRARY.functions
    place = x.data_ptr()
    status = functions.hb_linear(garbage.data_ptr(), 0, place, 1, None, place, 16, 1)
    with pytest.raises(ConfigError, match="Cannot run it: the bytes are not a packed weight"):
        check_status(status, "Cannot run it")


@pytest.mark.parametrize("wanted", ["serial", "avx2", "sse9"])
def test_environment_lowers_the_instruction_set_or_is_refused(wanted):
    code = "from halfbyte.kernels.native_library import open_library; print(open_library().isa)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HALFBYTE_CPU_ISA": wanted, "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if wanted in ISAS:
        assert done.stdout.strip() == wanted
    else:
        assert f"HALFBYTE_CPU_ISA is '{wanted}'; this CPU can use {ISAS[0]}" in done.stderr


def test_without_the_file_the_reason_says_what_to_do(monkeypatch):
    monkeypatch.setattr(native_library, "FILE_NAMES", ("libnone.so",))
    open_library.cache_clear()
    try:
        assert CpuNative().find_obstacle() == (
            "not built: halfbyte was installed without a C++ compiler; install one, then "
            "reinstall halfbyte"
        )
    finally:
        monkeypatch.undo()
        open_library.cache_clear()
