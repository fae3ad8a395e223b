"""What the scripts that time single layers on a GPU share: the layers, the peers, time and results.

A run is a CUDA graph over all copies of a weight, which are larger than the cache together.
"""

from __future__ import annotations

import ctypes
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpu_arms
from gpu_arms import Layer, Run
from halfbyte.kernels.gpu_device import name_architecture
from halfbyte.machine.facts import installed_versions, machine_facts

SHAPES = {
    "8B qkv": (4096, 6144),
    "8B o": (4096, 4096),
    "8B gate_up": (4096, 28672),
    "8B down": (14336, 4096),
    "70B qkv": (8192, 10240),
    "70B o": (8192, 8192),
    "70B gate_up": (8192, 57344),
    "70B down": (28672, 8192),
}
DTYPE = torch.bfloat16


class Session:
    """The results so far, and the remaining time."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path = path
        self.start = time.monotonic()
        self.end = self.start + seconds
        self.results: dict[str, Any] = {
            "device": torch.cuda.get_device_name(),
            "architecture": name_architecture(torch.device("cuda", 0)),
            "machine": machine_facts(),
            "versions": installed_versions() | {"triton": _triton_version()},
            "driver": _driver_version(),
        }

    def save(self, key: str, value: Any) -> None:
        """Set a result and write all results."""
        self.results[key] = value
        self.results["seconds"] = round(time.monotonic() - self.start, 1)
        self.path.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")

    def remaining_seconds(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()

    def run(self, name: str, part: Callable[[], None]) -> None:
        """Run a part; a failure is recorded as its result."""
        begin = time.monotonic()
        try:
            part()
        except Exception as error:  # noqa: BLE001 - the other parts still run
            self.save(f"{name} failed", f"{type(error).__name__}: {error}"[:2000])
            print(f"{name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
        print(f"-- {name}: {time.monotonic() - begin:.1f} s", flush=True)


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def _driver_version() -> int:
    found = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    return found.value


class Graph:
    """A captured run; one replay passes over all copies of the weight."""

    def __init__(self, run: Run, x: Tensor) -> None:
        self.calls = len(run(x))
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run(x)
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph, stream=stream):
                self.results = run(x)
        self.graph.replay()
        torch.cuda.synchronize()
        self.begin = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def time(self, replays: int) -> float:
        """Return the microseconds per call."""
        self.begin.record()
        for _ in range(replays):
            self.graph.replay()
        self.end.record()
        torch.cuda.synchronize()
        return float(self.begin.elapsed_time(self.end)) * 1e3 / (replays * self.calls)


def time_arms(arms: dict[str, Run], x: Tensor, rounds: int) -> dict[str, Any]:
    """Time arms in turn; return median and spread of the rounds, or why an arm failed."""
    graphs: dict[str, Graph] = {}
    found: dict[str, Any] = {}
    for name, run in arms.items():
        try:
            graphs[name] = Graph(run, x)
        except Exception as error:  # noqa: BLE001 - a failing peer is a result
            found[name] = f"{type(error).__name__}: {str(error)[:200]}"
    for name in ("cuda", "own"):
        if name in graphs and f"{name}, early start" in graphs:
            pair = (graphs[name].results, graphs[f"{name}, early start"].results)
            found["early start gives the same bits"] = all(map(torch.equal, *pair))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for round_number in range(rounds + 1):
        for name, graph in graphs.items():
            once = graph.time(1)
            if round_number:
                times[name].append(once)
    for name, values in times.items():
        median = statistics.median(values)
        spread = (max(values) - min(values)) / median
        found[name] = {"us": round(median, 3), "spread": round(spread, 4)}
    return found


def find_microseconds(found: dict[str, Any], name: str) -> float:
    """Return an arm's time, or infinity if it failed or was left out."""
    value = found.get(name)
    return value["us"] if isinstance(value, dict) else math.inf


def make_peers(
    session: Session, layer: Layer, folder: Path, peer_names: Sequence[str]
) -> dict[str, Run]:
    """Make the arms of other tools' kernels; record why one is missing."""
    reasons = session.results.setdefault("peers left out", {})
    makers: dict[str, Callable[[], Run]] = {
        "tinygemm": lambda: gpu_arms.run_tinygemm(layer),
        "marlin": lambda: gpu_arms.run_marlin(layer),
        "machete": lambda: gpu_arms.run_machete(layer),
        "humming": lambda: gpu_arms.run_humming(layer, folder / "humming"),
    }
    runs = {}
    for peer, make in makers.items():
        if peer in reasons or peer not in peer_names:
            continue
        try:
            if peer in ("marlin", "machete"):
                gpu_arms.load_vllm(folder)
            runs[peer] = make()
        except Exception as error:  # noqa: BLE001 - a failing peer is a result
            reasons[peer] = f"{type(error).__name__}: {str(error)[:500]}"
            print(f"no {peer}: {reasons[peer]}", flush=True)
    return runs


def find_distance(run: Run, x: Tensor, exact: Tensor) -> float | str:
    """Return the relative distance of a run's last result from the exact one, or its error."""
    try:
        found = run(x)[-1].float()
    except Exception as error:  # noqa: BLE001 - reported as this arm's outcome
        return f"{type(error).__name__}: {str(error)[:200]}"
    return round(float((found - exact).norm() / exact.norm()), 6)
