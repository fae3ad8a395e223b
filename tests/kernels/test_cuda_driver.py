"""Calls of the CUDA driver, recorded by a fake driver: contexts, launches and machine code."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from halfbyte.errors import KernelUnavailable
from halfbyte.kernels import cuda_config, cuda_driver, cuda_linear, cuda_rows, cuda_stream
from halfbyte.kernels.contract import Operands
from halfbyte.kernels.cuda_config import SMALLEST_SPEC
from halfbyte.kernels.cuda_rows import RowsConfig
from halfbyte.kernels.cuda_stream import StreamConfig

OURS = 77
"""The context of the device that all tensors are on."""


class Driver:
    """A fake driver that records the current context of each call that needs one."""

    def __init__(self):
        self.threads = threading.local()
        self.seen = []
        self.refused = ()
        self.changes = 0

    @property
    def stack(self):
        """The thread's context stack, initially empty."""
        if not hasattr(self.threads, "stack"):
            self.threads.stack = []
        return self.threads.stack

    def cuDevicePrimaryCtxRetain(self, context, handle):
        context._obj.value = OURS
        return 0

    def cuCtxGetCurrent(self, context):
        context._obj.value = self.stack[-1] if self.stack else None
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.stack.append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, context):
        context._obj.value = self.stack.pop()
        self.changes += 1
        return 0

    def cuModuleLoadData(self, module, cubin):
        self.note("load")
        return 300 * (cubin in self.refused)

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, count, *_):
        count._obj.value = 1
        return 0

    def cuTensorMapEncodeTiled(self, *_):
        self.note("encode")
        return 0

    def cuLaunchKernelEx(self, *_):
        self.note("launch")
        return 0

    def note(self, what):
        self.seen.append((what, self.stack[-1] if self.stack else None))

    def __getattr__(self, name):
        return lambda *_: 0


@pytest.fixture
def driver(monkeypatch):
    """Replace the driver, the compiler and torch's streams by fakes."""
    found = Driver()
    monkeypatch.setattr(cuda_driver, "load_driver", lambda: found)
    monkeypatch.setattr(cuda_driver, "compile_source", lambda *_, force=False: b"fresh")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))
    caches = (
        cuda_driver._find_context,
        cuda_driver.encode_boxes,
        cuda_config._load,
        cuda_stream._describe_weight,
    )
    for cache in caches:
        cache.cache_clear()
    yield found
    for cache in caches:
        cache.cache_clear()


PRODUCTS = {
    "few rows": (cuda_linear, cuda_linear.PREFERRED[0]),
    "few rows in bulk": (
        cuda_stream,
        StreamConfig(row_tiles=1, tiles=2, warps_out=1, warps_in=4, stages=2),
    ),
    "many rows": (cuda_rows, RowsConfig(rows=64, tiles=1, warpgroups=2, stages=4)),
}


def multiply(module, config):
    spec = replace(SMALLEST_SPEC, in_features=256, out_features=256)
    operands = Operands(
        weight=(torch.zeros(4, 16, 128, dtype=torch.int32),),
        qzeros=torch.empty(0),
        scales=torch.zeros(4, 256, dtype=torch.float16),
        g_idx=None,
    )
    rows = torch.zeros(1, 256, dtype=torch.bfloat16)
    return module.multiply(rows, operands, None, spec, config)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(
    "before", [[], [5], [OURS]], ids=["a new thread", "another device", "its own device"]
)
def test_a_product_runs_in_the_context_of_its_device(driver, product, before):
    def run():
        driver.stack.extend(before)
        multiply(*PRODUCTS[product])
        multiply(*PRODUCTS[product])
        assert driver.stack == before

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert (driver.changes == 0) == (before == [OURS])
    launches = [what for what, _ in driver.seen if what == "launch"]
    assert len(launches) == 2
    assert {context for _, context in driver.seen} == {OURS}
    assert ("encode", OURS) in driver.seen or product == "few rows"


def test_concurrent_launches_do_not_interfere(driver):
    met = threading.Barrier(2, timeout=10)
    launched = []

    def launch(config, function, parameters, extra):
        blocks = ctypes.cast(parameters[0], ctypes.POINTER(ctypes.c_uint))[0]
        met.wait()  # until the other thread has filled in its launch too
        launched.append((blocks, config._obj.blocks, config._obj.stream, config._obj.block[0]))
        return 0

    driver.cuLaunchKernelEx = launch
    function = cuda_driver.Function(
        b"fresh", "multiply", threads=64, shared_bytes=0, early_start=True
    )

    class Parameters(ctypes.Structure):
        _fields_ = (("blocks", ctypes.c_uint),)

    threads = [
        threading.Thread(
            target=function.launch, args=(blocks, Parameters(blocks=blocks), blocks + 1)
        )
        for blocks in (100, 200)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(launched) == [(100, 100, 101, 64), (200, 200, 201, 64)]


def test_machine_code_that_does_not_load_is_compiled_once_more(driver, monkeypatch):
    asked = []

    def compile_source(source, definitions, architecture, *, force=False):
        asked.append(force)
        return b"fresh" if force else b"damaged"

    def load():
        return cuda_driver.load_kernel(
            "multiply",
            {},
            "sm_90",
            torch.device("cuda", 0),
            threads=32,
            shared_bytes=0,
            early_start=False,
        )

    monkeypatch.setattr(cuda_driver, "compile_source", compile_source)
    driver.refused = (b"damaged",)
    load()
    assert asked == [False, True]
    driver.refused = (b"damaged", b"fresh")
    with pytest.raises(KernelUnavailable, match=r"cannot load multiply: .* \(300\)"):
        load()
    # Identical machine code is not loaded a second time.
    monkeypatch.setattr(cuda_driver, "compile_source", lambda *_, force=False: b"fresh")
    seen = len(driver.seen)
    with pytest.raises(KernelUnavailable, match="cannot load"):
        load()
    assert len(driver.seen) == seen + 1
