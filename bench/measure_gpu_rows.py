"""Find the fastest configurations of a CUDA kernel for an H100, and compare with other tools.

First, every candidate is compiled and checked against float64 in a separate process; one that hangs
is reported and not timed. Then, for every number of rows and shape, the candidates are timed, and
the fastest again, in turn with cuBLAS, halfbyte's earlier kernels and the peers. Results are
written after every case. Weights are cold, as in measure_gpu_kernels.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import gpu_arms
import gpu_checks
from gpu_arms import Layer, Run
from gpu_candidates import (
    KERNELS,
    Config,
    Kernel,
    name_candidate,
    name_config,
)
from gpu_timing import (
    DTYPE,
    SHAPES,
    Session,
    find_distance,
    find_microseconds,
    make_peers,
    time_arms,
)
from halfbyte.kernels.cuda_compiler import compile_source, read_source
from halfbyte.kernels.cuda_config import define_macros
from halfbyte.kernels.fragments import find_order, prepare_fragments
from halfbyte.kernels.registry import describe_spec

PEERS = ("tinygemm", "marlin", "machete", "humming")
HANG_SECONDS = 8.0
START_SECONDS = 30.0
"""Time limit for CUDA to start in a process."""
MIN_CHECKS = 3
"""If all of this many first checks fail, the cause is not the candidates, and checking stops."""
MAX_FAILURES = 12

# ------------------------------------------------------------------------------- checks


def check_one(kernel: Kernel, config: Config, kind: dict[str, Any]) -> dict[str, Any]:
    """Check a configuration against float64 at several numbers of rows, and for repeatability."""
    spec = gpu_checks.make_spec(**kind)
    case = {"kernel": str(config), "layer": describe_spec(spec)}
    config = kernel.module.fit_memory(config, spec, torch.float16)
    stored, weight = gpu_checks.make_operands(spec, spec.group_size + spec.bits)
    operands = replace(stored, weight=prepare_fragments(stored, spec))
    order = find_order(operands, spec)

    def multiply(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        rows = x if order is None else x.index_select(1, order)
        return kernel.module.multiply(rows, operands, bias, spec, config)

    return case | gpu_checks.check_product(multiply, weight, spec, kernel.list_check_rows(config))


def _check_from(connection: Connection, name: str, first: int) -> None:
    kernel = KERNELS[name]
    one = torch.ones(1, 1, dtype=torch.float64, device="cuda")
    (one @ one).item()
    connection.send(None)  # CUDA has started
    for config, kind in kernel.list_checks(kernel.list_candidates())[first:]:
        try:
            outcome = check_one(kernel, config, kind)
        except Exception as error:  # noqa: BLE001 - reported as this case's outcome
            outcome = {"problem": f"{type(error).__name__}: {str(error)[:400]}"}
        ends = outcome["problem"] is not None and not _is_alive()
        connection.send(outcome | {"ends": ends})
        if ends:
            return


def _is_alive() -> bool:
    """Whether the CUDA context works: after an illegal memory access, every call fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def collect(connection: Connection, outcomes: list[dict[str, Any]], count: int, end: float) -> None:
    """Receive outcomes from a process until it ends or hangs, or there are enough."""
    timeout = START_SECONDS
    try:
        while len(outcomes) < count and time.monotonic() < end and not find_stop(outcomes):
            if not connection.poll(timeout):
                outcomes.append({"problem": "hangs"})
                return
            outcome = connection.recv()
            timeout = HANG_SECONDS
            if outcome is None:
                continue
            outcomes.append(outcome)
            if outcome.pop("ends"):
                return
    except EOFError:
        outcomes.append({"problem": "its process died"})


def find_stop(outcomes: Sequence[dict[str, Any]]) -> str | None:
    """Return why checking should stop, or None."""
    bad = [outcome for outcome in outcomes if not gpu_checks.is_good(outcome)]
    if len(outcomes) >= MIN_CHECKS and len(bad) == len(outcomes):
        return f"the first {len(bad)} checks all failed; the last: {bad[-1]}"
    return f"{len(bad)} checks failed" if len(bad) > MAX_FAILURES else None


def check(session: Session, name: str, seconds: float) -> set[str]:
    """Check in a process that is killed if it hangs; return the correct candidates."""
    kernel = KERNELS[name]
    checks = kernel.list_checks(kernel.list_candidates())
    outcomes: list[dict[str, Any]] = []
    bad: dict[str, Any] = {}
    stop: str | None = None
    end = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    while len(outcomes) < len(checks) and time.monotonic() < end and stop is None:
        connection, theirs = context.Pipe()
        process = context.Process(
            target=_check_from, args=(theirs, name, len(outcomes)), daemon=True
        )
        process.start()
        theirs.close()
        collect(connection, outcomes, len(checks), end)
        process.kill()
        process.join()
        paired = zip(checks, outcomes, strict=False)
        bad = {f"{c} {k}": o for (c, k), o in paired if not gpu_checks.is_good(o)}
        session.save("correctness", {"checks": len(outcomes), "of": len(checks), "bad": bad})
        stop = find_stop(outcomes)
    if stop is None:
        for case, outcome in bad.items():
            print("BAD", case, outcome, flush=True)
    else:
        print(f"Stopped: {stop}", flush=True)
    print(f"{len(outcomes)} checks of {len(checks)}, {len(bad)} bad", flush=True)
    plain = [(c, o) for (c, k), o in zip(checks, outcomes, strict=False) if not k]
    wrong = {name_candidate(c) for c, o in plain if not gpu_checks.is_good(o)}
    return {name_candidate(c) for c, _ in plain} - wrong


def compile_candidates(kernel: Kernel) -> None:
    """Compile every candidate for the timed layers and for the checks."""
    source = read_source(kernel.source)
    fit = kernel.module.fit_memory
    candidates = kernel.list_candidates()
    jobs = [define_macros(config, gpu_checks.make_spec(), DTYPE) for config in candidates]
    for config, kind in kernel.list_checks(candidates):
        spec = gpu_checks.make_spec(**kind)
        jobs.append(define_macros(fit(config, spec, torch.float16), spec, torch.float16))
    distinct = {tuple(macros.items()): macros for macros in jobs}.values()
    with ThreadPoolExecutor(14) as pool:
        list(pool.map(lambda macros: compile_source(source, macros, kernel.architecture), distinct))


# ------------------------------------------------------------------------------- times


def list_arms(kernel: Kernel, layer: Layer, rows: int, correct: set[str]) -> dict[str, Run]:
    """List the correct candidates of a suitable size, with every useful number of splits."""
    return {
        name_config(split): gpu_arms.run_config(kernel.module, layer, split, kernel.early_start)
        for config in kernel.list_candidates()
        if name_candidate(config) in correct
        for split in kernel.list_splits(config, layer.spec, rows)
    }


def measure(
    session: Session,
    kernel: Kernel,
    layers: dict[str, Layer],
    correct: set[str],
    peers: dict[str, dict[str, Run]],
) -> None:
    """Find the fastest candidate of every case, and time it in turn with the others."""
    every: dict[str, Any] = {}
    best: dict[str, str] = {}
    table: dict[str, Any] = {}
    distances: dict[str, Any] = {}
    for rows in kernel.rows:
        for name, layer in layers.items():
            if session.remaining_seconds() < 4:
                return
            key = f"{name}, rows {rows}"
            x = torch.randn(rows, layer.spec.in_features, device="cuda", dtype=DTYPE)
            found = time_arms(list_arms(kernel, layer, rows, correct), x, 3 if rows < 4096 else 1)
            chosen = min(found, key=lambda arm: find_microseconds(found, arm), default=None)
            every[key] = found
            arms = {"cublas": gpu_arms.run_dense(layer)} | peers[name]
            if rows > 16:
                arms.pop("tinygemm", None)  # several times slower by then
            if chosen is not None:
                best[key] = chosen
                config = kernel.config(**json.loads(chosen))
                for arm, early in (("own", False), ("own, early start", True)):
                    arms[arm] = gpu_arms.run_config(kernel.module, layer, config, early)
            if rows <= 128:
                arms["triton"] = gpu_arms.run_triton(layer)
            if rows <= 16:
                arms["as chosen"] = gpu_arms.run_cuda(layer)
            if rows >= 256:
                arms["dequantize + cublas"] = gpu_arms.run_dequantized(layer)
            if rows in (16, 64, 256) and chosen is not None:
                exact = x.float() @ gpu_arms.dequantize_exactly(layer).t()
                distances[key] = {arm: find_distance(run, x, exact) for arm, run in arms.items()}
                del exact
                session.save("distance from fp32", distances)
            table[key] = time_arms(arms, x, 7 if rows < 4096 else 3)
            session.save("sweep", every)
            session.save("best", best)
            session.save("microseconds", table)
            speeds = {a: round(o["us"], 1) for a, o in table[key].items() if type(o) is dict}
            print(key, speeds, _shorten(chosen), flush=True)


def _shorten(chosen: str | None) -> str:
    return "" if chosen is None else " ".join(map(str, json.loads(chosen).values()))


def main() -> None:
    """Compile, check and time the candidates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", choices=list(KERNELS), default="rows")
    parser.add_argument("--output", type=Path, help="default: gpu-KERNEL.json")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--check-seconds", type=float, default=45)
    parser.add_argument("--peers", type=Path, default=Path(".peers-gpu"))
    parser.add_argument(
        "--humming", action="store_true", help="also measure Humming, which compiles first"
    )
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("Nothing measured: this needs a GPU.")
        return
    kernel = KERNELS[options.kernel]
    output = options.output or Path(f"gpu-{options.kernel}.json")
    session = Session(output, options.seconds)
    session.save("kernel", options.kernel)
    correct: set[str] = set()
    session.run("compile", lambda: compile_candidates(kernel))
    session.run(
        "check", lambda: correct.update(check(session, options.kernel, options.check_seconds))
    )
    if not correct:
        print("Nothing timed: no candidate passed its checks.")
        return
    layers = {name: gpu_arms.make_layer(*SHAPES[name], DTYPE) for name in options.shapes}
    peer_names = PEERS if options.humming else PEERS[:-1]
    peers = {
        name: make_peers(session, layer, options.peers, peer_names)
        for name, layer in layers.items()
    }
    session.run("measure", lambda: measure(session, kernel, layers, correct, peers))


if __name__ == "__main__":
    main()
