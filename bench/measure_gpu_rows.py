"""How fast is the CUDA kernel for many rows, cut in which way, beside other tools' kernels?

First every candidate is compiled and checked against float64 in a process of its own: one that
never ends is told, and not timed. Then, for every number of rows and shape, the candidates are
timed, and the fastest once more, in turn with cuBLAS, with what halfbyte had before and with the
peers. What is known is written after every case. Weights are cold, as in measure_gpu_kernels.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import gpu_arms
import gpu_checks
from gpu_arms import Layer, Run
from halfbyte.kernels import cuda_rows
from halfbyte.kernels.contract import LinearSpec
from halfbyte.kernels.cuda_driver import compile_source, read_source
from halfbyte.kernels.cuda_rows import RowsConfig
from halfbyte.kernels.fragments import find_order, prepare_fragments
from halfbyte.kernels.registry import describe_spec
from measure_gpu_kernels import (
    DTYPE,
    SHAPES,
    Session,
    find_distance,
    find_microseconds,
    make_peers,
    time_arms,
)

ROWS = (64, 128, 256, 512, 32, 1024, 16, 8, 1, 4096)
PEERS = ("tinygemm", "marlin", "machete")
SPLITS = (0, 1, 2, 3, 4, 8)
HANG_SECONDS = 8.0
START_SECONDS = 22.0
"""Of a process until its first outcome, more than a check's own."""

BLOCKS = [
    # rows, tiles, warpgroups, blocks, cluster; as many stages as there is room for, 16 at most
    (8, 2, 2, 1, 1), (8, 4, 2, 1, 1), (8, 2, 2, 2, 1), (8, 2, 4, 1, 1),
    (16, 2, 2, 1, 1), (16, 4, 2, 1, 1), (16, 1, 4, 1, 1), (16, 2, 2, 2, 1), (16, 2, 4, 1, 1),
    (32, 2, 2, 1, 1), (32, 1, 2, 2, 1), (32, 4, 2, 1, 1),
    (64, 2, 2, 1, 1), (64, 1, 2, 2, 1), (64, 4, 2, 1, 1), (64, 1, 3, 1, 1),
    (64, 2, 2, 1, 2),
    (128, 2, 2, 1, 1), (128, 1, 2, 1, 1), (128, 1, 3, 1, 1), (128, 2, 2, 1, 2), (128, 1, 2, 1, 2),
    (256, 1, 2, 1, 1), (256, 1, 2, 1, 2),
]  # fmt: skip
JOINED = (2, 3, 4)
JOINED_BLOCKS = ((64, 2), (128, 2), (128, 1), (256, 1))
"""Rows and tiles, of two warpgroups, that are tried with clusters that share a tile too."""


def list_candidates() -> list[RowsConfig]:
    """Every thread block of the sweep; the splits come later."""
    spec = make_spec()
    found = []
    for rows, tiles, warpgroups, blocks, cluster in BLOCKS:
        config = RowsConfig(
            rows=rows, tiles=tiles, warpgroups=warpgroups, stages=16, blocks=blocks, cluster=cluster
        )
        config = cuda_rows.fit_memory(config, spec, torch.float16)
        found.append(config)
        if warpgroups == 2 and (blocks, cluster) == (1, 1) and (rows, tiles) in JOINED_BLOCKS:
            found.extend(replace(config, splits=joined, joined=joined) for joined in JOINED)
    turns = [config for config in found if takes_turns(config)]
    return found + [replace(config, turns=1) for config in turns]


def takes_turns(config: RowsConfig) -> bool:
    """Whether it is tried with warpgroups that begin their products in turns."""
    alone = config.blocks == config.cluster == 1
    return config.rows >= 32 and config.warpgroups == 2 and config.tiles <= 2 and alone


def make_spec(**changed: Any) -> LinearSpec:
    """A layer of no round size: 4 bits, groups of 128, symmetric, bf16."""
    base = LinearSpec(
        bits=4,
        group_size=128,
        symmetric=True,
        act_order=False,
        zero_offset=1,
        dtype=DTYPE,
        device_type="cuda",
        **gpu_checks.SIZES,
    )
    return replace(base, **changed)


# ------------------------------------------------------------------------------- checks

KINDS: list[dict[str, Any]] = [
    {},
    {"group_size": 32, "symmetric": False},
    {"group_size": 64, "symmetric": False, "act_order": True, "dtype": torch.float16},
    {"group_size": 1152},
    {"bits": 8, "group_size": 64, "symmetric": False},
    {"bits": 3, "group_size": 32, "symmetric": False, "dtype": torch.float16},
    {"bits": 2},
]


def list_checks(candidates: Sequence[RowsConfig]) -> list[tuple[RowsConfig, dict[str, Any]]]:
    """What to check: each candidate on the plain kind, some on all kinds."""
    plain = [
        (replace(config, splits=splits), KINDS[0])
        for config in candidates
        for splits in ((0, 3) if config.joined == 1 else (config.splits,))
    ]
    some = [config for config in candidates if (config.rows, config.tiles) in ((64, 2), (128, 1))]
    some = [config for config in some if config.joined < 3]
    kinds = [(config, kind) for config in some for kind in KINDS[1:]]
    return [*plain, *kinds]


def check_one(config: RowsConfig, kind: dict[str, Any]) -> dict[str, Any]:
    """Compare with float64 at several numbers of rows, and with itself."""
    spec = make_spec(**kind)
    told = {"kernel": str(config), "layer": describe_spec(spec)}
    config = cuda_rows.fit_memory(config, spec, torch.float16)
    stored, weight = gpu_checks.make_operands(spec, spec.group_size + spec.bits)
    operands = replace(stored, weight=prepare_fragments(stored, spec))
    order = find_order(operands, spec)

    def multiply(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        rows = x if order is None else x.index_select(1, order)
        return cuda_rows.multiply(rows, operands, bias, spec, config)

    rows_list = (1, config.rows - 1, config.rows, 2 * config.rows + 3)
    return told | gpu_checks.check_product(multiply, weight, spec, rows_list)


def _check_from(connection: Connection, first: int) -> None:
    for config, kind in list_checks(list_candidates())[first:]:
        try:
            outcome = check_one(config, kind)
        except Exception as error:  # noqa: BLE001 - reported as this case's outcome
            outcome = {"problem": f"{type(error).__name__}: {str(error)[:400]}"}
        connection.send(outcome)


def check(session: Session, seconds: float) -> set[str]:
    """Check in a process that is ended where it hangs; give the candidates that are right."""
    checks = list_checks(list_candidates())
    outcomes: list[dict[str, Any]] = []
    bad: dict[str, Any] = {}
    end = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    while len(outcomes) < len(checks) and time.monotonic() < end:
        connection, theirs = context.Pipe()
        process = context.Process(target=_check_from, args=(theirs, len(outcomes)), daemon=True)
        process.start()
        theirs.close()
        patience = START_SECONDS
        try:
            while len(outcomes) < len(checks) and time.monotonic() < end:
                if not connection.poll(patience + HANG_SECONDS):
                    outcomes.append({"problem": "hangs"})
                    break
                outcomes.append(connection.recv())
                patience = 0.0
                if "CUDA" in (outcomes[-1].get("problem") or ""):
                    break  # all that follows in this process would fail too
        except EOFError:
            outcomes.append({"problem": "its process died"})
        process.kill()
        process.join()
        told = zip(checks, outcomes, strict=False)
        bad = {f"{c} {k}": o for (c, k), o in told if not gpu_checks.is_good(o)}
        session.keep("correctness", {"checks": len(outcomes), "of": len(checks), "bad": bad})
        if len(bad) > 12:
            break
    for name, outcome in bad.items():
        print("BAD", name, outcome, flush=True)
    print(f"{len(outcomes)} checks of {len(checks)}, {len(bad)} bad", flush=True)
    plain = [(c, o) for (c, k), o in zip(checks, outcomes, strict=False) if not k]
    wrong = {_name(replace(c, splits=0)) for c, o in plain if not gpu_checks.is_good(o)}
    return {_name(replace(c, splits=0)) for c, _ in plain} - wrong


def _name(config: RowsConfig) -> str:
    return json.dumps(asdict(config))


def compile_candidates() -> None:
    """Compile every candidate for the layers that are timed, and for the checks."""
    source = read_source("multiply_rows.cu")
    candidates = list_candidates()
    jobs = [cuda_rows.define_macros(config, make_spec(), DTYPE) for config in candidates]
    for config, kind in list_checks(candidates):
        spec = make_spec(**kind)
        jobs.append(
            cuda_rows.define_macros(
                cuda_rows.fit_memory(config, spec, torch.float16), spec, torch.float16
            )
        )
    distinct = {tuple(macros.items()): macros for macros in jobs}.values()
    with ThreadPoolExecutor(14) as pool:
        list(pool.map(lambda macros: compile_source(source, macros, "sm_90a"), distinct))


# ------------------------------------------------------------------------------- times


def list_arms(layer: Layer, rows: int, right: set[str]) -> dict[str, Run]:
    """The candidates that are right and of a fitting size, cut in every way that makes sense."""
    arms = {}
    for config in list_candidates():
        if _name(replace(config, splits=0)) not in right or not rows <= 16 * config.rows:
            continue
        if config.rows > max(rows, 8) or (config.rows < 128 and rows > 2 * config.rows):
            continue
        tiles = config.count_tiles(layer.spec, rows)
        for splits in SPLITS if config.joined == 1 else (config.joined,):
            runs = tiles * splits
            if splits > 1 and (runs > 4 * 132 or layer.spec.in_features // splits < 512):
                continue
            if splits == 1 and runs < 64:
                continue
            cut = replace(config, splits=splits)
            if cuda_rows.find_mismatch(cut, layer.spec, rows) is None:
                arms[_name(cut)] = gpu_arms.run_rows(layer, cut, False)
    return arms


def measure(session: Session, layers: dict[str, Layer], folder: Path, right: set[str]) -> None:
    """Find the fastest candidate of every case, and time it beside the others."""
    peers = {name: make_peers(session, layer, folder, PEERS) for name, layer in layers.items()}
    every: dict[str, Any] = {}
    best: dict[str, str] = {}
    table: dict[str, Any] = {}
    distances: dict[str, Any] = {}
    for rows in ROWS:
        for name, layer in layers.items():
            if session.left() < 4:
                return
            key = f"{name}, rows {rows}"
            x = torch.randn(rows, layer.spec.in_features, device="cuda", dtype=DTYPE)
            found = time_arms(list_arms(layer, rows, right), x, 3 if rows < 4096 else 1)
            chosen = min(found, key=lambda arm: find_microseconds(found, arm), default=None)
            every[key] = found
            arms = {"cublas": gpu_arms.run_dense(layer)} | peers[name]
            if rows > 16:
                arms.pop("tinygemm", None)  # several times as slow by then
            if chosen is not None:
                best[key] = chosen
                config = RowsConfig(**json.loads(chosen))
                arms["rows"] = gpu_arms.run_rows(layer, config, False)
                arms["rows, early start"] = gpu_arms.run_rows(layer, config, True)
            if rows <= 128:
                arms["triton"] = gpu_arms.run_triton(layer)
            if rows <= 16:
                arms["as chosen"] = gpu_arms.run_cuda(layer)
            if rows >= 256:
                arms["dequantize + cublas"] = gpu_arms.run_dequantized(layer)
            if rows in (64, 256) and chosen is not None:
                exact = x.float() @ gpu_arms.dequantize_exactly(layer).t()
                distances[key] = {arm: find_distance(run, x, exact) for arm, run in arms.items()}
                del exact
                session.keep("distance from fp32", distances)
            table[key] = time_arms(arms, x, 7 if rows < 4096 else 3)
            session.keep("sweep", every)
            session.keep("best", best)
            session.keep("microseconds", table)
            speeds = {a: round(o["us"], 1) for a, o in table[key].items() if type(o) is dict}
            print(key, speeds, _shorten(chosen), flush=True)


def _shorten(chosen: str | None) -> str:
    return "" if chosen is None else " ".join(map(str, json.loads(chosen).values()))


def main() -> None:
    """Compile, check, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-rows.json"))
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--check-seconds", type=float, default=45)
    parser.add_argument("--peers", type=Path, default=Path(".peers-gpu"))
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("Nothing measured: needs a GPU.")
        return
    session = Session(options.output, options.seconds)
    right: set[str] = set()
    session.run("compile", compile_candidates)
    session.run("check", lambda: right.update(check(session, options.check_seconds)))
    if not right:
        print("Nothing timed: no candidate is right.")
        return
    layers = {name: gpu_arms.make_layer(*SHAPES[name], DTYPE) for name in options.shapes}
    session.run("measure", lambda: measure(session, layers, options.peers, right))


if __name__ == "__main__":
    main()
