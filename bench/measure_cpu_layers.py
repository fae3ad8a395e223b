"""Measure the CPU kernel on single layers: against memory bandwidth for few rows, GEMM for many.

Weights are cold: each call reads another copy, and the copies of a layer exceed any cache. They are
packed as when a model is loaded, on huge pages if available; so is the buffer that measures memory
bandwidth. The arms of a case run in turn, so that other load affects all of them equally; medians
and quartiles over the rounds are saved.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.kernels.cpu_native import CpuNative
from halfbyte.kernels.native_library import DTYPES, open_library
from record import save_result

SHAPES = {
    "1B attention": (2048, 2048),
    "1B gate/up": (2048, 8192),
    "1B down": (8192, 2048),
    "8B attention": (4096, 4096),
    "8B gate/up": (4096, 14336),
    "8B down": (14336, 4096),
}
"""Input and output features."""
DECODE_ROWS = (1, 2, 4, 8)
PROMPT_ROWS = 512
GROUP_SIZE = 128
COLD_BYTES = 700 * 2**20
"""Total size of an arm's copies of the weight."""


def main() -> None:
    """Measure, print and save both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--dry-run", action="store_true", help="print without saving")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    buffer = allocate_buffer(COLD_BYTES)
    decode, prompt, data = [], [], {}
    for name in arguments.shapes:
        layer = ColdLayer(*SHAPES[name], dtype)
        for rows in DECODE_ROWS:
            times = layer.measure(rows, arguments.rounds, buffer)
            data[f"{name}, {rows} rows"] = spread(times)
            decode.append([name, rows, *compare_with_memory(layer, times, buffer.nbytes)])
            print_row(decode[-1])
        times = layer.measure(PROMPT_ROWS, max(arguments.rounds // 3, 3), None)
        data[f"{name}, {PROMPT_ROWS} rows"] = spread(times)
        prompt.append([name, *compare_with_dense(layer, times)])
        print_row(prompt[-1])
    if arguments.dry_run:
        return
    setting = (
        f"4 bits, group {GROUP_SIZE}, symmetric, {arguments.dtype}, "
        f"{torch.get_num_threads()} threads, {open_library().isa}; medians of "
        f"{arguments.rounds} rounds, arms in turn"
    )
    save_result(
        "cpu-layers",
        columns=[
            "layer",
            "rows",
            "halfbyte, µs",
            f"dense {arguments.dtype}, µs",
            "times faster",
            "GB/s read",
            "memory, GB/s",
            "of memory's speed",
            "library alone",
        ],
        rows=decode,
        note=f"{setting}; weights cold (copies of {COLD_BYTES >> 20} MiB in turn); memory's speed "
        "is that of reading such a stretch once, beside each case; the library alone: the same "
        "share without the kernel's Python, as in the compiled decoder.",
        data=data,
    )
    save_result(
        "cpu-prompt",
        columns=["layer", "halfbyte, GFLOP/s", "dense, GFLOP/s", "of the dense rate"],
        rows=prompt,
        note=f"{setting}; {PROMPT_ROWS} rows, weights cold.",
        data={},
    )


def compare_with_memory(
    layer: ColdLayer, times: dict[str, list[float]], buffer_bytes: int
) -> list[float]:
    """Return times, speedup, and bandwidths relative to that of memory."""
    medians = {arm: statistics.median(found) for arm, found in times.items()}
    bandwidth = buffer_bytes / medians["read"] / 1e9
    speed = layer.packed_bytes / medians["packed"] / 1e9
    library_speed = layer.packed_bytes / medians["library"] / 1e9
    return [
        medians["packed"] * 1e6,
        medians["dense"] * 1e6,
        medians["dense"] / medians["packed"],
        speed,
        bandwidth,
        speed / bandwidth,
        library_speed / bandwidth,
    ]


def compare_with_dense(layer: ColdLayer, times: dict[str, list[float]]) -> list[float]:
    """Return the rates of both arms in GFLOP/s, and their ratio."""
    medians = {arm: statistics.median(found) for arm, found in times.items()}
    gflop = 2 * PROMPT_ROWS * layer.weights / 1e9
    return [
        gflop / medians["packed"],
        gflop / medians["dense"],
        medians["dense"] / medians["packed"],
    ]


def print_row(row: list[str | float]) -> None:
    """Print a row with four significant digits."""
    print(*[f"{v:.4g}" if isinstance(v, float) else v for v in row], flush=True)


def spread(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the quartiles of each arm's seconds."""
    return {arm: statistics.quantiles(found, n=4) for arm, found in times.items()}


def allocate_buffer(num_bytes: int) -> Tensor:
    """Allocate memory to read, on pages like those of packed weights."""
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int64).fill_(1)


class ColdLayer:
    """One layer, packed and dense, in more copies than any cache holds."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        """Make random weights.

        Args:
            in_features: Columns of the weight.
            out_features: Rows of the weight.
            dtype: Of x and of the dense weight.
        """
        self.kernel = CpuNative()
        self.weights = in_features * out_features
        groups = in_features // GROUP_SIZE
        self.spec = LinearSpec(
            bits=4,
            group_size=GROUP_SIZE,
            in_features=in_features,
            out_features=out_features,
            symmetric=True,
            act_order=False,
            zero_offset=1,
            dtype=dtype,
            device_type="cpu",
        )
        words = torch.randint(-(2**31), 2**31, (in_features // 8, out_features), dtype=torch.int32)
        self.stored = Operands(
            weight=(words,),
            qzeros=torch.zeros(groups, out_features // 8, dtype=torch.int32),
            scales=(torch.rand(groups, out_features) * 0.01 + 0.01).half(),
            g_idx=None,
        )
        (packed,) = self.kernel.prepare(self.stored, self.spec)
        self.packed_bytes = packed.nbytes
        self.packed = [self._pack() for _ in range(-(-COLD_BYTES // packed.nbytes))]
        dense = torch.randn(out_features, in_features).to(dtype)
        self.dense = [dense.clone() for _ in range(-(-COLD_BYTES // dense.nbytes))]
        self.calls = 0

    def measure(self, rows: int, rounds: int, buffer: Tensor | None) -> dict[str, list[float]]:
        """Time every arm once per round.

        Args:
            rows: Number of rows of x.
            rounds: Number of rounds.
            buffer: Buffer to read once per round, or None.

        Returns:
            Seconds per call by arm, one value per round, each averaged over several calls.
        """
        x = torch.randn(rows, self.spec.in_features).to(self.spec.dtype)
        functions = open_library().functions
        assert functions is not None
        calls = max(int(2e8 / self.packed_bytes / max(rows / 8, 1)), 2)
        arms: dict[str, Callable[[], object]] = {
            "packed": lambda: self.kernel.apply(x, self.next_packed(), None, self.spec),
            "dense": lambda: functional.linear(x, self.dense[self.calls % len(self.dense)]),
        }
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        if buffer is not None:
            arms["library"] = self.call_library(x)
            times |= {"library": [], "read": []}
        threads = torch.get_num_threads()
        for _ in range(rounds):
            for arm, run in arms.items():
                num_calls = max(calls // 4, 2) if arm == "dense" else calls
                times[arm].append(self.time(run, num_calls))
            if buffer is not None:
                start = time.perf_counter()
                functions.hb_read(buffer.data_ptr(), buffer.nbytes, threads)
                times["read"].append(time.perf_counter() - start)
        return times

    def call_library(self, x: Tensor) -> Callable[[], object]:
        """Return a function that multiplies the next copy without the kernel's Python code."""
        functions = open_library().functions
        assert functions is not None
        out = x.new_empty(x.shape[0], self.spec.out_features)
        pointers = [packed.weight[0].data_ptr() for packed in self.packed]
        threads = torch.get_num_threads()

        def call() -> None:
            pointer = pointers[self.calls % len(pointers)]
            dtype, rows = DTYPES[x.dtype], x.shape[0]
            functions.hb_linear(
                pointer, dtype, x.data_ptr(), rows, None, out.data_ptr(), 16, threads
            )

        return call

    def time(self, run: Callable[[], object], calls: int) -> float:
        """Return the seconds per call."""
        start = time.perf_counter()
        for _ in range(calls):
            run()
            self.calls += 1
        return (time.perf_counter() - start) / calls

    def next_packed(self) -> Operands:
        """Return the next copy."""
        return self.packed[self.calls % len(self.packed)]

    def _pack(self) -> Operands:
        weight = self.kernel.prepare(self.stored, self.spec)
        return Operands(
            weight=weight, qzeros=self.stored.qzeros, scales=self.stored.scales, g_idx=None
        )


if __name__ == "__main__":
    main()
