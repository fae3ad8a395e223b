"""The emulated GPU detects mistakes that otherwise only a real GPU would."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
from tests.helpers import cuda_emulation
from tests.helpers.cuda_emulation import check_product, find_compiler, multiply_stream_emulated

from halfbyte.kernels.cuda_stream import StreamConfig

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")

MISTAKES = {
    "barriers that are not published": (
        "    publish_barriers();",
        "",
        "at a barrier that was not published",
    ),
    "a slot that is not aligned": (
        "constexpr u32 CODES_AT = ",
        "constexpr u32 CODES_AT = 16 + ",
        "where it is not aligned",
    ),
    "x before it is there": (
        "  wait_for_inputs();\n  for",
        "  for",
        "x is copied while an earlier launch may write it",
    ),
    "counters that are still in use": (
        "    wait_for_inputs();  // until then",
        "    // until then",
        "a counter is counted up while an earlier launch may use it",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake, monkeypatch, tmp_path):
    right, wrong, told = MISTAKES[mistake]
    sources = shutil.copytree(cuda_emulation.SOURCES, tmp_path / "cuda")
    kernel = sources / "multiply_stream.cu"
    text = kernel.read_text()
    assert text.count(right) == 1
    kernel.write_text(text.replace(right, wrong))
    monkeypatch.setattr(cuda_emulation, "SOURCES", sources)
    monkeypatch.setattr(cuda_emulation, "build", cuda_emulation.build.__wrapped__)
    config = StreamConfig(row_tiles=1, tiles=2, warps_out=1, warps_in=4, stages=3)
    multiply = partial(multiply_stream_emulated, config=config, resident=3)
    with pytest.raises(AssertionError, match=told):
        check_product(multiply, 4, group_size=64)
