"""Times and profiles the blocks of a quantization run, and writes them as they finish."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from halfbyte.machine.memory import peak_memory_bytes
from halfbyte.quantize.block_work import Meter
from halfbyte.quantize.progress import SilentProgress

TABLE_ROWS = 30


class TimeLimitReached(Exception):
    """The time limit was reached between two blocks."""


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class SyncedMeter(Meter):
    """Synchronizes the device before it adds the time of a phase."""

    device = torch.device("cpu")
    last: Meter

    def __init__(self) -> None:
        super().__init__()
        type(self).last = self

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of a phase, including work queued on the device."""
        with super().timed(phase):
            yield
            synchronize(self.device)


class BlockTimer(SilentProgress):
    """Times every block, profiles one, and stops the run at the time limit."""

    def __init__(
        self, options: argparse.Namespace, results: dict[str, Any], all_results: dict[str, Any]
    ) -> None:
        self.options, self.results, self.all_results = options, results, all_results
        self.device = torch.device(options.device)
        self.start = time.perf_counter()
        self.before: dict[str, float] = {}
        self.block_start = 0.0
        self.profiler: Any = None
        self.results.update(blocks=[], events=[], plan=[])

    def started(self, plan: tuple[str, ...]) -> None:
        """Record the plan."""
        self.results["plan"] = list(plan)
        print("\n".join(plan), flush=True)
        self.phase("blocks")

    def phase(self, name: str) -> None:
        """Record the start of a phase after the blocks."""
        self._end_block()
        synchronize(self.device)
        self.results["events"].append([round(self.elapsed, 3), name])
        self.save()

    def block_started(self, index: int, count: int) -> None:
        """Record the previous block, and start timing the next."""
        self._end_block()
        if self.elapsed > self.options.limit_seconds:
            raise TimeLimitReached
        if not self.results["blocks"]:
            # The part before the first block, such as the embeddings, is done.
            self.results["events"].append([round(self.elapsed, 3), "first block"])
        self.block_start = time.perf_counter()
        self.before = dict(SyncedMeter.last.seconds)
        if index == self.options.profile:
            self.profiler = start_profiler(self.device)

    @property
    def elapsed(self) -> float:
        """Seconds since the run started, without profiling overhead."""
        return time.perf_counter() - self.start

    def _end_block(self) -> None:
        if not self.block_start:
            return
        synchronize(self.device)
        seconds = time.perf_counter() - self.block_start
        self.block_start = 0.0
        after = SyncedMeter.last.seconds
        phases = {name: round(after[name] - self.before.get(name, 0), 4) for name in after}
        block = {"seconds": round(seconds, 4), "phases": phases, **read_peaks(self.device)}
        if self.profiler is not None:
            began = time.perf_counter()
            self.profiler.__exit__(None, None, None)
            name = f"{self.options.output.stem}-{self.results['memory']}.profile.txt"
            path = self.options.output.with_name(name)
            self.results["profile"] = write_profile(self.profiler, path)
            block["profiled"] = True
            self.profiler = None
            # Writing the profile is not part of the run.
            self.start += time.perf_counter() - began
        self.results["blocks"].append(block)
        print(len(self.results["blocks"]), block, flush=True)
        self.save()

    def save(self) -> None:
        """Write all results so far."""
        self.options.output.write_text(
            json.dumps(self.all_results, indent=1) + "\n", encoding="utf-8"
        )


def read_peaks(device: torch.device) -> dict[str, float]:
    """Return the peaks of memory so far. Unit: GB."""
    found = {"host_gb": round(peak_memory_bytes() / 1e9, 2)}
    if device.type == "cuda":
        found["gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        found["gpu_reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    return found


def start_profiler(device: torch.device) -> Any:
    """Start a profiler."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=kinds, acc_events=True)
    profiler.__enter__()
    return profiler


def write_profile(profiler: Any, path: Path) -> dict[str, Any]:
    """Write the profile's tables; return its sums."""
    averages = profiler.key_averages()
    text = ""
    for key in ("self_device_time_total", "self_cpu_time_total"):
        text += f"{key}\n"
        text += averages.table(sort_by=key, row_limit=TABLE_ROWS, max_name_column_width=70)
    path.write_text(text, encoding="utf-8")
    return {
        "device_seconds": sum(e.self_device_time_total for e in averages) / 1e6,
        "operations": sum(e.count for e in averages),
        "by_device_time": [
            [e.key[:90], e.count, round(e.self_device_time_total / 1e3, 3)]
            for e in sorted(averages, key=lambda e: -e.self_device_time_total)[:TABLE_ROWS]
        ],
    }
