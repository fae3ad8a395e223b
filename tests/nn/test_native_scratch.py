"""The planned scratch memory of the compiled decoder against what the library allocates."""

from __future__ import annotations

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.helpers.native import NEEDS_LIBRARY
from tests.nn.test_native_decoder import load

from halfbyte.kernels.native_library import Decoder, open_library
from halfbyte.nn.native_decoder import NativeDecoder, get_sizes
from halfbyte.nn.native_scratch import LISTS_BYTES, plan_scratch_bytes

pytestmark = [
    *NEEDS_LIBRARY,
    pytest.mark.skipif(sys.platform != "linux", reason="asks glibc for what is allocated"),
]
LENGTH = 300


class Mallinfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def count_allocated_bytes():
    function = ctypes.CDLL(None).mallinfo2
    function.restype = Mallinfo
    found = function()
    return found.uordblks + found.hblkhd


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", ["llama", "norms of heads", "experts", "mixtral"])
def test_plan_is_slightly_more_than_the_library_allocates(tmp_path, name, prompt, dtype):
    model = load(tmp_path, name, dtype)
    decoder, sizes = NativeDecoder(model, LENGTH), Decoder(**get_sizes(model))
    tiles = prompt and dtype == torch.bfloat16 and bool(open_library().functions.hb_tiles())

    def run():
        before = count_allocated_bytes()
        decoder.run([3] * LENGTH, list(range(LENGTH)), [0], [0] * LENGTH, prompt=prompt)
        return count_allocated_bytes() - before

    # The library keeps its memory per thread: a new one has none.
    with ThreadPoolExecutor(1) as pool:
        allocated = pool.submit(run).result()
    planned = plan_scratch_bytes(sizes, LENGTH, LENGTH, tiles=tiles, threads=1)
    assert planned - 2 * LISTS_BYTES < allocated < planned
