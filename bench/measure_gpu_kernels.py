"""How fast is a 4-bit layer on this GPU, beside bf16 cuBLAS and other tools' kernels?

Fills ``src/halfbyte/kernels/triton_configs`` and ``cuda_configs`` for this architecture with the
best configurations found. Weights are cold (copies in turn, more than the cache holds), a run is a
CUDA graph over all copies, the arms of a case run in turn, and the median of the rounds counts.
What is known is written after every case, so that a run that is cut off loses nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gpu_arms
from gpu_arms import Layer, Run
from halfbyte.kernels import cuda_linear, triton_linear
from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.kernels.cuda_driver import Function, compile_source
from halfbyte.kernels.cuda_linear import CudaConfig, CudaLinear
from halfbyte.kernels.fragments import prepare_fragments, restore_fragments
from halfbyte.kernels.gpu_device import count_processors, name_architecture
from halfbyte.kernels.registry import describe_spec
from halfbyte.kernels.torch_reference import dequantize_weight
from halfbyte.kernels.triton_configs import TritonConfig
from halfbyte.kernels.triton_linear import TritonLinear
from halfbyte.packing import pack_weight, pack_zeros
from halfbyte.quantize.provenance import installed_versions, machine_facts

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
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 4096)
DTYPE = torch.bfloat16

CUDA_CANDIDATES = [
    CudaConfig(row_tiles=r, tiles=t, warps_out=o, warps_in=i, stages=s)
    for r, parts in {
        1: [
            (4, 1, 8, 3), (4, 1, 8, 4), (4, 1, 8, 5), (4, 1, 4, 4), (4, 1, 4, 6), (4, 1, 4, 8),
            (2, 1, 8, 4), (2, 1, 8, 6), (2, 1, 16, 4), (8, 1, 4, 3), (8, 1, 4, 4), (4, 2, 4, 4),
            (2, 1, 4, 8), (4, 1, 2, 8), (1, 1, 8, 8),
        ],
        2: [
            (4, 1, 8, 3), (4, 1, 4, 4), (4, 2, 4, 3), (4, 2, 4, 4), (8, 1, 4, 3), (2, 2, 8, 3),
            (4, 2, 2, 4), (4, 4, 2, 4), (2, 4, 4, 3), (2, 1, 8, 4),
        ],
        4: [
            (4, 4, 2, 3), (4, 4, 2, 4), (4, 2, 4, 3), (4, 2, 2, 4), (2, 4, 2, 4), (4, 4, 1, 5),
            (2, 4, 4, 3), (2, 8, 1, 4), (2, 2, 4, 3),
        ],
        8: [
            (2, 4, 2, 3), (2, 4, 2, 4), (4, 4, 1, 4), (2, 4, 1, 5), (2, 8, 1, 4), (2, 2, 4, 3),
            (1, 8, 2, 3), (4, 2, 2, 3),
            (1, 8, 1, 4), (1, 8, 1, 6), (1, 4, 2, 4), (1, 4, 4, 3),
        ],
    }.items()
    for t, o, i, s in parts
]  # fmt: skip

TRITON_CANDIDATES = {
    16: [
        (64, 16, 4, 4), (64, 16, 4, 6), (128, 16, 4, 4), (128, 16, 4, 6), (128, 16, 8, 5),
    ],
    32: [(64, 32, 4, 5), (128, 32, 4, 4), (128, 32, 8, 4)],
    64: [(64, 64, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4), (256, 64, 8, 3)],
    128: [(128, 128, 8, 3), (128, 64, 4, 4), (128, 128, 4, 3)],
}  # fmt: skip
SPLITS = (1, 2, 4, 8)


class Session:
    """The results so far, and the time that is left."""

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

    def keep(self, key: str, value: Any) -> None:
        """Write what is known."""
        self.results[key] = value
        self.results["seconds"] = round(time.monotonic() - self.start, 1)
        self.path.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def run(self, name: str, part: Callable[[], None]) -> None:
        """Run a part; what goes wrong in it is a result."""
        begin = time.monotonic()
        try:
            part()
        except Exception as error:  # noqa: BLE001 - the other parts are worth having
            self.keep(f"{name} failed", f"{type(error).__name__}: {error}"[:2000])
            print(f"{name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
        print(f"-- {name}: {time.monotonic() - begin:.1f} s", flush=True)


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def _driver_version() -> int:
    found = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    return found.value


# ------------------------------------------------------------------------------- timing


class Graph:
    """A run captured once; a replay is one pass over all copies of the weight."""

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
        """Microseconds of a call."""
        self.begin.record()
        for _ in range(replays):
            self.graph.replay()
        self.end.record()
        torch.cuda.synchronize()
        return float(self.begin.elapsed_time(self.end)) * 1e3 / (replays * self.calls)


def time_arms(arms: dict[str, Run], x: Tensor, rounds: int) -> dict[str, Any]:
    """Time arms in turn; median and spread of the rounds, microseconds; or why an arm failed."""
    graphs: dict[str, Graph] = {}
    found: dict[str, Any] = {}
    for name, run in arms.items():
        try:
            graphs[name] = Graph(run, x)
        except Exception as error:  # noqa: BLE001 - a peer that cannot is a result
            found[name] = f"{type(error).__name__}: {str(error)[:200]}"
    if "cuda" in graphs and "cuda, early start" in graphs:
        pair = (graphs["cuda"].results, graphs["cuda, early start"].results)
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
    """A time, or infinity where the arm failed or was left out."""
    value = found.get(name)
    return value["us"] if isinstance(value, dict) else math.inf


# ------------------------------------------------------------------------- correctness


def make_operands(spec: LinearSpec, seed: int) -> tuple[Operands, Tensor]:
    """Random stored tensors on the GPU, and the weight in float64 by torch alone."""
    generator = torch.Generator().manual_seed(seed)
    high = 2**spec.bits
    codes = torch.randint(0, high, (spec.out_features, spec.in_features), generator=generator)
    shape = (spec.out_features, spec.num_groups)
    zeros = torch.full(shape, high // 2)
    if not spec.symmetric:
        zeros = torch.randint(spec.zero_offset, high, shape, generator=generator)
    scales = (torch.rand(shape[::-1], generator=generator) * 0.02 + 0.01).half()
    g_idx = torch.arange(spec.in_features, dtype=torch.int32) // spec.group_size
    g_idx = g_idx[torch.randperm(spec.in_features, generator=generator)]
    stored = Operands(
        weight=(pack_weight(codes, spec.bits).cuda(),),
        qzeros=pack_zeros(zeros, spec.bits, spec.zero_offset).cuda(),
        scales=scales.cuda(),
        g_idx=g_idx.cuda() if spec.act_order else None,
    )
    weight = dequantize_weight(
        stored.weight[0],
        stored.qzeros,
        stored.scales,
        stored.g_idx,
        bits=spec.bits,
        zero_offset=spec.zero_offset,
        group_size=spec.group_size,
        dtype=torch.float64,
    )
    return stored, weight


def list_specs() -> list[LinearSpec]:
    """Layers that between them have every property."""
    base = LinearSpec(
        bits=4,
        group_size=128,
        in_features=1152,
        out_features=1056,
        symmetric=True,
        act_order=False,
        zero_offset=1,
        dtype=DTYPE,
        device_type="cuda",
    )
    changes: list[dict[str, Any]] = [
        {},
        {"dtype": torch.float16},
        {"group_size": 32},
        {"group_size": 64, "symmetric": False},
        {"group_size": 1152, "symmetric": False, "zero_offset": 0},
        {"act_order": True, "symmetric": False},
        {"act_order": True, "group_size": 32, "symmetric": False, "dtype": torch.float16},
        {"bits": 8, "symmetric": False},
        {"bits": 8, "group_size": 32, "dtype": torch.float16},
        {"bits": 3, "symmetric": False, "group_size": 64},
        {"bits": 2, "group_size": 32, "symmetric": False},
        {"in_features": 4096, "out_features": 4096},
        {"in_features": 640, "group_size": 256},
    ]
    return [replace(base, **change) for change in changes]


def check_layer(number: int) -> list[dict[str, Any]]:
    """Compare both kernels with float64 on one kind of layer, and with themselves."""
    spec = list_specs()[number]
    stored, weight = make_operands(spec, number)
    operands = replace(stored, weight=prepare_fragments(stored, spec))
    restored = torch.equal(restore_fragments(operands, spec), stored.weight[0])
    return [
        {"kernel": kernel.name, "layer": describe_spec(spec), "restores_bits": restored}
        | check_kernel(kernel, operands, weight, spec)
        for kernel in (CudaLinear(), TritonLinear())
    ]


def check_kernel(
    kernel: TritonLinear, operands: Operands, weight: Tensor, spec: LinearSpec
) -> dict[str, Any]:
    """Compare a kernel with float64 at several numbers of rows."""
    worst, same, exact = 0.0, True, False
    try:
        exact = torch.equal(kernel.dequantize(operands, spec, torch.float64), weight)
        for rows in (1, 7, 16, 33, 64, 200):
            x = torch.randn(rows, spec.in_features, device="cuda").to(spec.dtype)
            bias = torch.randn(spec.out_features, device="cuda").to(spec.dtype)
            found = kernel.apply(x, operands, bias, spec)
            for _ in range(5):
                same &= torch.equal(found, kernel.apply(x, operands, bias, spec))
            true = x.double() @ weight.t() + bias.double()
            size = x.double().abs() @ weight.abs().t() + bias.double().abs()
            ratio = ((found.double() - true).abs() / size).max() / kernel.error_bound(spec)
            # Not-a-number must not pass for small.
            worst = max(worst, float(ratio)) if bool(torch.isfinite(ratio)) else math.inf
        problem = None
    except Exception as error:  # noqa: BLE001 - reported as this case's outcome
        problem = f"{type(error).__name__}: {str(error)[:400]}"
    return {
        "error_over_bound": worst,
        "repeats_bit_for_bit": same,
        "dequantizes_exactly": exact,
        "problem": problem,
        "good": problem is None and worst <= 1 and same and exact,
    }


# --------------------------------------------------------------------------- bandwidth

READ_SOURCE = """
extern "C" __global__ void __launch_bounds__(512) read_all(struct A { const uint4* from; unsigned*
to; unsigned long long count; } a) {
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
    """Of ``read_all``."""

    _fields_ = (("source", ctypes.c_void_p), ("to", ctypes.c_void_p), ("count", ctypes.c_uint64))


def measure_bandwidth(session: Session) -> None:
    """Read 4 GB and nothing else; then copy 2 GB."""
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
    for name, act, size in (
        *(
            (
                f"read, {blocks} blocks a multiprocessor",
                lambda blocks=blocks: function.launch(
                    blocks * count_processors(device), arguments, stream
                ),
                data.nbytes,
            )
            for blocks in (2, 4)
        ),
        ("copy", lambda: target.copy_(half), 2 * half.nbytes),
    ):
        times = []
        for _ in range(8):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            act()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        found[name] = round(size / statistics.median(times[2:]) / 1e9, 3)
    print("TB/s:", found, flush=True)
    session.keep("terabytes_per_second", found)


# ------------------------------------------------------------------------------- sweeps


def check_and_compile(session: Session) -> None:
    """Check the kernels and compile every candidate, on all cores.

    In processes of their own: Triton compiles on one core, and what crashes a device's context
    must not crash the measurement.
    """
    context = multiprocessing.get_context("spawn")
    jobs = list_triton_candidates()
    outcomes: list[dict[str, Any]] = []
    with ProcessPoolExecutor(14, mp_context=context) as pool:
        checks = [pool.submit(check_layer, number) for number in range(len(list_specs()))]
        compiled = [pool.submit(_compile_triton, jobs[start::8]) for start in range(8)]
        _compile_cuda()
        for check in checks:
            try:
                outcomes.extend(check.result(timeout=max(session.left() - 30, 1)))
            except Exception as error:  # noqa: BLE001 - the other layers' outcomes are wanted
                outcomes.append(
                    {"good": False, "problem": f"{type(error).__name__}: {error}"[:400]}
                )
            session.keep("correctness", outcomes)
        for outcome in outcomes:
            print("ok " if outcome["good"] else "BAD", outcome, flush=True)
        for job in compiled:
            job.result(timeout=max(session.left() - 30, 1))


def _compile_cuda() -> None:
    spec = gpu_arms.make_layer(256, 256, DTYPE, cold=False).spec
    source = cuda_linear.read_source("multiply.cu")
    architecture = name_architecture(torch.device("cuda", 0))
    candidates = {*CUDA_CANDIDATES, *cuda_linear.PREFERRED}

    def compile_one(config: CudaConfig) -> None:
        compile_source(source, cuda_linear.define_macros(config, spec, DTYPE), architecture)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(compile_one, candidates))


def list_triton_candidates() -> list[TritonConfig]:
    """Every Triton candidate."""
    return [
        TritonConfig(out, rows, splits, warps, stages)
        for parts in TRITON_CANDIDATES.values()
        for out, rows, warps, stages in parts
        for splits in SPLITS
    ]


def _compile_triton(configs: list[TritonConfig]) -> None:
    layer = gpu_arms.make_layer(2048, 512, DTYPE, cold=False)
    for config in configs:
        x = torch.randn(config.block_rows, 2048, device="cuda", dtype=DTYPE)
        triton_linear.multiply(x, layer.copies[0], None, layer.spec, config)
    torch.cuda.synchronize()


def sweep(session: Session, layers: dict[str, Layer]) -> None:
    """Time every candidate on every shape, and keep the best for each rows bucket."""
    limit = cuda_linear.find_shared_limit(torch.device("cuda", 0))
    best: dict[str, Any] = {"cuda": {}, "triton": {}}
    every: dict[str, Any] = {"cuda": {}, "triton": {}}
    for name, layer in layers.items():
        for row_tiles in (1, 2, 4, 8):
            if session.left() < 45:
                return
            arms = {}
            for config in CUDA_CANDIDATES:
                size = cuda_linear.count_shared_bytes(config, layer.spec, DTYPE)
                if config.row_tiles == row_tiles and size <= limit:
                    arms[json.dumps(asdict(config))] = gpu_arms.run_cuda(layer, config, False)
            x = torch.randn(row_tiles * 8, layer.spec.in_features, device="cuda", dtype=DTYPE)
            found = time_arms(arms, x, 5)
            key = f"{name}, rows {row_tiles * 8}"
            every["cuda"][key] = found
            chosen = min(found, key=lambda arm: find_microseconds(found, arm))
            best["cuda"][key] = chosen
            print(key, chosen, found[chosen], flush=True)
            session.keep("best", best)
            session.keep("sweep", every)
        for bucket, parts in TRITON_CANDIDATES.items():
            if session.left() < 45:
                return
            arms = {}
            for out, rows, warps, stages in parts:
                for splits in SPLITS:
                    config = TritonConfig(out, rows, splits, warps, stages)
                    arms[json.dumps(asdict(config))] = gpu_arms.run_triton(layer, config)
            x = torch.randn(bucket, layer.spec.in_features, device="cuda", dtype=DTYPE)
            found = time_arms(arms, x, 3)
            key = f"{name}, rows {bucket}"
            every["triton"][key] = found
            chosen = min(found, key=lambda arm: find_microseconds(found, arm))
            best["triton"][key] = chosen
            print(key, chosen, found[chosen], flush=True)
            session.keep("best", best)
            session.keep("sweep", every)


# ------------------------------------------------------------------------- the comparison


def list_arms(session: Session, name: str, layer: Layer, rows: int) -> dict[str, Run]:
    """Our arms of a case, and cuBLAS."""
    arms: dict[str, Run] = {"cublas": gpu_arms.run_dense(layer)}
    best = session.results.get("best", {"cuda": {}, "triton": {}})
    bucket = next((size for size in (8, 16, 32, 64) if rows <= size), None)
    if bucket is not None:
        chosen = best["cuda"].get(f"{name}, rows {bucket}")
        limit = cuda_linear.find_shared_limit(torch.device("cuda", 0))
        config = cuda_linear.choose_config(rows, layer.spec, DTYPE, limit)
        if chosen:
            config = CudaConfig(**json.loads(chosen))
        arms["cuda"] = gpu_arms.run_cuda(layer, config, False)
        arms["cuda, early start"] = gpu_arms.run_cuda(layer, config, True)
    bucket = next((size for size in TRITON_CANDIDATES if rows <= size), None)
    chosen = best["triton"].get(f"{name}, rows {bucket}")
    if chosen:
        arms["triton"] = gpu_arms.run_triton(layer, TritonConfig(**json.loads(chosen)))
    elif rows <= 64:
        arms["triton"] = gpu_arms.run_triton(layer)
    if rows >= 64:
        arms["dequantize + cublas"] = gpu_arms.run_dequantized(layer)
    return arms


def make_peers(
    session: Session, layer: Layer, folder: Path, wanted: Sequence[str]
) -> dict[str, Run]:
    """Other tools' kernels on a layer; why one is missing is a result."""
    reasons = session.results.setdefault("peers left out", {})
    makers: dict[str, Callable[[], Run]] = {
        "tinygemm": lambda: gpu_arms.run_tinygemm(layer),
        "marlin": lambda: gpu_arms.run_marlin(layer),
        "machete": lambda: gpu_arms.run_machete(layer),
        "humming": lambda: gpu_arms.run_humming(layer, folder / "humming"),
    }
    runs = {}
    for peer, make in makers.items():
        if peer in reasons or peer not in wanted:
            continue
        try:
            if peer in ("marlin", "machete"):
                gpu_arms.load_vllm(folder)
            runs[peer] = make()
        except Exception as error:  # noqa: BLE001 - a peer that cannot is a result
            reasons[peer] = f"{type(error).__name__}: {str(error)[:500]}"
            print(f"no {peer}: {reasons[peer]}", flush=True)
    return runs


def compare(
    session: Session,
    layers: dict[str, Layer],
    folder: Path,
    *,
    key: str,
    rows_list: Sequence[int],
    wanted: Sequence[str],
) -> None:
    """Time all arms in turn on every shape and number of rows; and check what they compute."""
    table: dict[str, Any] = {}
    agreement: dict[str, Any] = {}
    for name, layer in layers.items():
        peers = make_peers(session, layer, folder, wanted)
        for rows in rows_list:
            if session.left() < 5:
                return
            x = torch.randn(rows, layer.spec.in_features, device="cuda", dtype=DTYPE)
            arms = list_arms(session, name, layer, rows) | peers
            if rows > 256:
                arms.pop("tinygemm", None)
            if rows in (16, 256):
                exact = x.float() @ layer.dense[0].float().t()
                agreement[f"{name}, rows {rows}"] = {
                    arm: _distance(run, x, exact) for arm, run in arms.items()
                }
                session.keep(f"{key}, distance from fp32", agreement)
                del exact
            found = time_arms(arms, x, 7 if rows <= 256 else 3)
            table[f"{name}, rows {rows}"] = found
            session.keep(key, table)
            speeds = {arm: round(one["us"], 1) for arm, one in found.items() if type(one) is dict}
            print(name, rows, speeds, flush=True)


def _distance(run: Run, x: Tensor, exact: Tensor) -> float | str:
    try:
        found = run(x)[-1].float()
    except Exception as error:  # noqa: BLE001 - reported as this arm's outcome
        return f"{type(error).__name__}: {str(error)[:200]}"
    return round(float((found - exact).norm() / exact.norm()), 6)


def main() -> None:
    """Measure, in the order of what is wanted most."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-kernels.json"))
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--peers", type=Path, default=Path(".peers-gpu"))
    parser.add_argument("--humming", action="store_true", help="measure Humming too; it compiles")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--skip", nargs="*", default=[], help="check, bandwidth, sweep, compare")
    options = parser.parse_args()
    session = Session(options.output, options.seconds)
    if "bandwidth" not in options.skip:
        session.run("bandwidth", lambda: measure_bandwidth(session))
    if "check" not in options.skip:
        session.run("check", lambda: check_and_compile(session))
    layers = {name: gpu_arms.make_layer(*SHAPES[name], DTYPE) for name in options.shapes}
    if "sweep" not in options.skip:
        session.run("sweep", lambda: sweep(session, layers))
    if "compare" not in options.skip:
        session.run(
            "compare",
            lambda: compare(
                session,
                layers,
                options.peers,
                key="microseconds",
                rows_list=ROWS,
                wanted=("tinygemm", "marlin", "machete"),
            ),
        )
    if options.humming:
        # Apart and last: it compiles for each shape and number of rows.
        session.run(
            "humming",
            lambda: compare(
                session,
                layers,
                options.peers,
                key="microseconds beside humming",
                rows_list=(1, 16, 64),
                wanted=("humming",),
            ),
        )


if __name__ == "__main__":
    main()
