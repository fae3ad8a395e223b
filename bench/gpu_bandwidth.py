"""Measure a GPU's memory bandwidth: a kernel that only reads 4 GB, and a copy."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable

import torch

from halfbyte.kernels.cuda_compiler import compile_source
from halfbyte.kernels.cuda_driver import Function
from halfbyte.kernels.gpu_device import count_processors, name_architecture

READ_SOURCE = """
struct Arguments {
  const uint4* from;
  unsigned* to;
  unsigned long long count;
};
extern "C" __global__ void __launch_bounds__(512) read_all(Arguments a) {
  unsigned long long stride = (unsigned long long)gridDim.x * 512;
  unsigned sum = 0;
  unsigned long long i = (unsigned long long)blockIdx.x * 512 + threadIdx.x;
  for (; i + 3 * stride < a.count; i += 4 * stride) {
    uint4 p = a.from[i], q = a.from[i + stride];
    uint4 r = a.from[i + 2 * stride], s = a.from[i + 3 * stride];
    sum ^= p.x ^ p.y ^ p.z ^ p.w ^ q.x ^ q.y ^ q.z ^ q.w ^ r.x ^ r.y ^ r.z ^ r.w ^ s.x ^ s.y ^ s.z
    ^ s.w;
  }
  if (sum == 0x12345) *a.to = sum;
}
"""


class ReadArguments(ctypes.Structure):
    """Parameter of the kernel ``read_all``."""

    _fields_ = (("source", ctypes.c_void_p), ("to", ctypes.c_void_p), ("count", ctypes.c_uint64))


def measure_bandwidth() -> dict[str, float]:
    """Read 4 GB, then copy 2 GB. Unit: TB/s."""
    device = torch.device("cuda", 0)
    data = torch.randint(0, 2**31, (2**30,), dtype=torch.int32, device=device)
    sink = torch.zeros(1, dtype=torch.int32, device=device)
    cubin = compile_source(READ_SOURCE, {}, name_architecture(device))
    function = Function(cubin, "read_all", threads=512, shared_bytes=0, early_start=False)
    arguments = ReadArguments(source=data.data_ptr(), to=sink.data_ptr(), count=data.nbytes // 16)
    stream = torch.cuda.current_stream().cuda_stream
    half = data[: 2**29]
    target = torch.empty_like(half)
    found = {}

    def read(blocks: int) -> Callable[[], object]:
        grid = blocks * count_processors(device)
        return lambda: function.launch(grid, arguments, stream)

    for name, run, size in (
        ("read, 2 blocks a multiprocessor", read(2), data.nbytes),
        ("read, 4 blocks a multiprocessor", read(4), data.nbytes),
        ("copy", lambda: target.copy_(half), 2 * half.nbytes),
    ):
        times = []
        for _ in range(8):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        found[name] = round(size / statistics.median(times[2:]) / 1e9, 3)
    return found
