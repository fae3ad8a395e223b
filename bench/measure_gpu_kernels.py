"""Measure 4-bit layers on a GPU: halfbyte's kernels, bf16 cuBLAS and other tools' kernels.

Also finds the best configurations for ``src/halfbyte/kernels/gpu_table``; ``keep_gpu.py`` saves
both. Weights are cold (copies in turn, larger than the cache together), a run is a CUDA graph over
all copies, the arms of a case run in turn, and the median of the rounds is recorded. Results are
written after every case, so that an interrupted run loses nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import gpu_arms
import gpu_checks
from gpu_arms import Layer, Run
from gpu_bandwidth import measure_bandwidth
from gpu_timing import (
    DTYPE,
    SHAPES,
    Session,
    find_distance,
    find_microseconds,
    make_peers,
    time_arms,
)
from halfbyte.kernels import cuda_linear, triton_linear
from halfbyte.kernels.cuda_compiler import compile_source, read_source
from halfbyte.kernels.cuda_config import define_macros
from halfbyte.kernels.cuda_linear import CudaConfig
from halfbyte.kernels.gpu_device import name_architecture
from halfbyte.kernels.registry import describe_spec
from halfbyte.kernels.triton_configs import TritonConfig

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 4096)

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
    256: [(128, 128, 8, 3), (128, 64, 4, 4), (128, 256, 8, 3)],
}  # fmt: skip
SPLITS = (1, 2, 4, 8)


# ------------------------------------------------------------------------------- sweeps


def check(session: Session, part: str, share: float) -> None:
    """Check the kernels in a share of the remaining time, and report failures in full.

    Runs in separate processes: Triton compiles on one core, and a fault that breaks a CUDA context
    must not end the measurement.
    """
    jobs = gpu_checks.list_jobs(session.results["architecture"])
    jobs = [job for job in jobs if bool(job.configs) == (part == "every")]
    outcomes: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    end = time.monotonic() + session.remaining_seconds() * share
    with ProcessPoolExecutor(14, mp_context=multiprocessing.get_context("spawn")) as pool:
        checks = [pool.submit(gpu_checks.check_job, job) for job in jobs]
        for job, one in zip(jobs, checks, strict=True):
            if time.monotonic() > end:
                one.cancel()
                continue
            try:
                outcomes.extend(one.result(timeout=max(end - time.monotonic(), 1)))
            except Exception as error:  # noqa: BLE001 - the other layers are still checked
                problem = f"{type(error).__name__}: {error}"[:400]
                outcomes.append({"layer": describe_spec(job.spec), "problem": problem})
            bad = [outcome for outcome in outcomes if not gpu_checks.is_good(outcome)]
            layers = {outcome["layer"] for outcome in outcomes}
            session.save(
                f"correctness, {part}",
                {"checks": len(outcomes), "layers": len(layers), "jobs": len(jobs), "bad": bad},
            )
        pool.shutdown(cancel_futures=True)
    for outcome in bad:
        print("BAD", outcome, flush=True)
    print(f"{len(outcomes)} checks, {len(bad)} bad", flush=True)


def compile_candidates() -> None:
    """Compile every candidate of the sweep on all cores."""
    jobs = list_triton_candidates()
    with ProcessPoolExecutor(14, mp_context=multiprocessing.get_context("spawn")) as pool:
        compiled = [pool.submit(_compile_triton, jobs[start::8]) for start in range(8)]
        _compile_cuda()
        for job in compiled:
            job.result()


def _compile_cuda() -> None:
    spec = gpu_arms.make_layer(256, 256, DTYPE, cold=False).spec
    source = read_source("multiply.cu")
    architecture = name_architecture(torch.device("cuda", 0))
    candidates = {*CUDA_CANDIDATES, *cuda_linear.PREFERRED}

    def compile_one(config: CudaConfig) -> None:
        compile_source(source, define_macros(config, spec, DTYPE), architecture)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(compile_one, candidates))


def list_triton_candidates() -> list[TritonConfig]:
    """List every Triton candidate."""
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
    """Time every candidate on every shape, and save the best for each bucket of rows."""
    limit = cuda_linear.SHARED_LIMIT[session.results["architecture"]]
    best: dict[str, Any] = {"cuda": {}, "triton": {}}
    every: dict[str, Any] = {"cuda": {}, "triton": {}}
    for name, layer in layers.items():
        for row_tiles in (1, 2, 4, 8):
            if session.remaining_seconds() < 45:
                return
            arms = {}
            for config in CUDA_CANDIDATES:
                size = config.count_shared_bytes(layer.spec, DTYPE)
                if config.row_tiles == row_tiles and size <= limit:
                    arms[json.dumps(asdict(config))] = gpu_arms.run_cuda(layer, config, False)
            x = torch.randn(row_tiles * 8, layer.spec.in_features, device="cuda", dtype=DTYPE)
            found = time_arms(arms, x, 5)
            key = f"{name}, rows {row_tiles * 8}"
            every["cuda"][key] = found
            chosen = min(found, key=lambda arm: find_microseconds(found, arm))
            best["cuda"][key] = chosen
            print(key, chosen, found[chosen], flush=True)
            session.save("best", best)
            session.save("sweep", every)
        for bucket, parts in TRITON_CANDIDATES.items():
            if session.remaining_seconds() < 45:
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
            session.save("best", best)
            session.save("sweep", every)


# ------------------------------------------------------------------------- the comparison


def list_arms(session: Session, name: str, layer: Layer, rows: int) -> dict[str, Run]:
    """List halfbyte's arms of a case, and cuBLAS."""
    arms: dict[str, Run] = {"cublas": gpu_arms.run_dense(layer)}
    best = session.results.get("best", {"cuda": {}, "triton": {}})
    bucket = next((size for size in (8, 16, 32, 64) if rows <= size), None)
    if bucket is not None:
        chosen = best["cuda"].get(f"{name}, rows {bucket}")
        architecture = session.results["architecture"]
        config = cuda_linear.choose_config(architecture, rows, layer.spec, DTYPE)
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


def compare(
    session: Session,
    layers: dict[str, Layer],
    folder: Path,
    *,
    key: str,
    rows_list: Sequence[int],
    peer_names: Sequence[str],
) -> None:
    """Time all arms in turn on every shape and number of rows, and compare their results."""
    table: dict[str, Any] = {}
    agreement: dict[str, Any] = {}
    for name, layer in layers.items():
        peers = make_peers(session, layer, folder, peer_names)
        for rows in rows_list:
            if session.remaining_seconds() < 5:
                return
            x = torch.randn(rows, layer.spec.in_features, device="cuda", dtype=DTYPE)
            arms = list_arms(session, name, layer, rows) | peers
            if rows > 256:
                arms.pop("tinygemm", None)
            if rows in (16, 256):
                exact = x.float() @ gpu_arms.dequantize_exactly(layer).t()
                agreement[f"{name}, rows {rows}"] = {
                    arm: find_distance(run, x, exact) for arm, run in arms.items()
                }
                session.save(f"{key}, distance from fp32", agreement)
                del exact
            found = time_arms(arms, x, 7 if rows <= 256 else 3)
            table[f"{name}, rows {rows}"] = found
            session.save(key, table)
            speeds = {arm: round(one["us"], 1) for arm, one in found.items() if type(one) is dict}
            print(name, rows, speeds, flush=True)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-kernels.json"))
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--peers", type=Path, default=Path(".peers-gpu"))
    parser.add_argument(
        "--check-all", action="store_true", help="also check every shipped configuration"
    )
    parser.add_argument(
        "--humming", action="store_true", help="also measure Humming, which compiles first"
    )
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument(
        "--skip", nargs="*", default=[], help="parts to skip: check, bandwidth, sweep, compare"
    )
    return parser.parse_args()


def main() -> None:
    """Run all parts, most important first."""
    options = parse_arguments()
    if not torch.cuda.is_available():
        print("Nothing measured: this needs a GPU.")
        return
    session = Session(options.output, options.seconds)
    if "bandwidth" not in options.skip:
        session.run("bandwidth", lambda: session.save("terabytes_per_second", measure_bandwidth()))
    if "check" not in options.skip:
        session.run("check", lambda: check(session, "chosen", 0.6))
    if options.check_all:
        session.run("check all", lambda: check(session, "every", 0.9))
    layers = {name: gpu_arms.make_layer(*SHAPES[name], DTYPE) for name in options.shapes}
    if "sweep" not in options.skip:
        session.run("compile", compile_candidates)
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
                peer_names=("tinygemm", "marlin", "machete"),
            ),
        )
    if options.humming:
        # Separately and last, because it compiles for each shape and number of rows.
        session.run(
            "humming",
            lambda: compare(
                session,
                layers,
                options.peers,
                key="microseconds beside humming",
                rows_list=(1, 16, 64),
                peer_names=("humming",),
            ),
        )


if __name__ == "__main__":
    main()
