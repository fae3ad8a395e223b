"""Turn output of measure_gpu_rows.py into a result for the docs and shipped configurations.

    python bench/keep_gpu_rows.py gpu-rows.json --commit 0e60713 --date 2026-11-26
    python bench/keep_gpu_rows.py gpu-stream.json --commit 0e60713 --date 2026-11-26

The file names its kernel. For each number of rows, all shapes share the thread block with the best
geometric mean; a shape gets another one only if it is 3% faster, because each has to be compiled.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_timing import SHAPES, find_microseconds
from halfbyte.kernels import cuda_rows, cuda_stream
from keep_gpu import TABLES, geometric_mean, join_entries, name_sizes
from record import Provenance, save_result

KERNEL = "own, early start"
BEFORE = ("as chosen", "triton", "dequantize + cublas")
PEERS = ("tinygemm", "marlin", "machete", "humming")
MAX_TIME_RATIO = 0.97
"""Of another thread block's time to the shared one's, for it to be shipped."""

Case = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """The part of the shipped table that a kernel's measurement fills."""

    name: str
    buckets: tuple[int, ...]
    lists_slower: bool
    """Whether shapes on which the kernel is slower get an entry (of None)."""


PARTS = {
    "rows": Part("many_rows", cuda_rows.BUCKETS, True),
    "stream": Part("stream", cuda_stream.BUCKETS, False),
}


def main() -> None:
    """Write the table and save the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, nargs="+", help="output files, oldest first")
    parser.add_argument("--commit", required=True, help="commit that was measured")
    parser.add_argument("--date", required=True, help="date of the measurement")
    options = parser.parse_args()
    measured = join_runs([json.loads(run.read_text(encoding="utf-8")) for run in options.rows])
    write_table(measured, options.date)
    save_means(
        measured,
        Provenance(
            date=options.date,
            commit=options.commit,
            command=f"python bench/measure_gpu_rows.py --kernel {measured['kernel']}",
            machine=measured["machine"],
            versions=measured["versions"],
        ),
    )


def join_runs(runs: Sequence[Case]) -> Case:
    """Fill in cases that the last run did not reach from earlier runs.

    Args:
        runs: Of one GPU, oldest first.

    Returns:
        The last run, with the added cases.

    Raises:
        SystemExit: The runs are from different GPUs.
    """
    devices = sorted({run["device"] for run in runs})
    if len(devices) > 1:
        raise SystemExit(f"Runs of different GPUs cannot be joined: {', '.join(devices)}.")
    joined = dict(runs[-1])
    for part in ("sweep", "best", "microseconds", "distance from fp32"):
        joined[part] = {key: case for run in runs for key, case in run.get(part, {}).items()}
    joined["cases of earlier runs"] = sorted(
        joined["microseconds"].keys() - runs[-1]["microseconds"].keys()
    )
    return joined


def write_table(measured: Case, date: str) -> None:
    """Write the kernel's configurations and their origin into the architecture's table."""
    path = TABLES / f"{measured['architecture']}.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    part = PARTS[measured["kernel"]]
    table["made_of"][part.name] = f"{measured['device']}, {date}"
    table[part.name] = [
        {**name_sizes(shape), "rows": rows, "config": config}
        for rows in part.buckets
        for shape, config in choose_configs(measured, rows).items()
        if config is not None or part.lists_slower
    ]
    lines = json.dumps(table, indent=1).splitlines()
    path.write_text("\n".join(join_entries(lines)) + "\n", encoding="utf-8")


def choose_configs(measured: Case, rows: int) -> dict[str, dict[str, int] | None]:
    """Choose the configuration of each shape; None if the kernels it had before are faster."""
    keys = {shape: f"{shape}, rows {rows}" for shape in SHAPES}
    # An interrupted run has timed the candidates of its last case, but not the other arms.
    times = {
        shape: _by_block(measured["sweep"][key])
        for shape, key in keys.items()
        if key in measured["sweep"] and key in measured["microseconds"]
    }
    if not times:
        return {}
    blocks = set.intersection(*(set(case) for case in times.values()))
    shared = min(
        blocks, key=lambda block: geometric_mean(case[block][0] for case in times.values())
    )
    chosen: dict[str, dict[str, int] | None] = {}
    for shape, case in times.items():
        best = min(case, key=lambda block: case[block][0])
        block = best if case[best][0] < MAX_TIME_RATIO * case[shared][0] else shared
        config = case[block][1]
        before = _find_fastest(measured["microseconds"][keys[shape]], BEFORE)
        faster = find_time(measured, shape, rows, config) < before
        chosen[shape] = config if faster else None
    return chosen


def find_time(measured: Case, shape: str, rows: int, config: Mapping[str, int]) -> float:
    """Find a configuration's time, comparable with those of other tools' kernels.

    Args:
        measured: The run.
        shape: The layer's name.
        rows: Number of rows of x.
        config: Configuration of the kernel.

    Returns:
        Microseconds. Only the fastest configuration was timed in turn with the other tools; the
        time of another is scaled by the ratio of the two in the sweep. Infinity if not timed.
    """
    key = f"{shape}, rows {rows}"
    sweep = measured["sweep"][key]
    found = find_microseconds(sweep, json.dumps(config))
    return (
        found
        / _find_fastest(sweep, sweep)
        * _find_fastest(measured["microseconds"][key], (KERNEL,))
    )


def _by_block(case: Case) -> dict[str, tuple[float, dict[str, int]]]:
    """Return the time and configuration with the best splits, by thread block."""
    found: dict[str, tuple[float, dict[str, int]]] = {}
    for name in case:
        config = json.loads(name)
        block = json.dumps({field: value for field, value in config.items() if field != "splits"})
        time = find_microseconds(case, name)
        if math.isfinite(time) and (block not in found or time < found[block][0]):
            found[block] = time, config
    return found


def save_means(measured: Case, provenance: Provenance) -> None:
    """Save the geometric means by number of rows."""
    cases = measured["microseconds"]
    humming = any("humming" in case for case in cases.values())
    rows_list = sorted({int(key.rsplit(" ", 1)[1]) for key in cases})
    save_result(
        f"gpu-{measured['kernel']}",
        columns=[
            "rows of x",
            "halfbyte over the best peer",
            "the least",
            "runs this kernel on",
            "that kernel over the best peer",
            "without early start",
            "over what halfbyte had before",
            "over bf16 cuBLAS",
        ],
        rows=[row for rows in rows_list if (row := _average_case(measured, rows)) is not None],
        note=(
            "Speed as a ratio, above 1 is faster; geometric means over the eight linears of the 8B "
            "and the 70B Llama; 4 bits, groups of 128, symmetric, bf16. Peers: the fastest of vLLM "
            "0.24's Marlin and Machete and, up to 16 rows, torch's tinygemm"
            + (", and Humming 0.1.19," if humming else "")
            + " in each case. halfbyte: what it runs by its shipped table, which was made of this "
            "run, with early start. The kernel: the fastest of its candidates, timed again in turn "
            "with the others; where another is shipped, halfbyte is as much slower as that was "
            "among the candidates. Weights cold, CUDA graphs, medians of 7 rounds (3 for 4096 "
            "rows)." + _note_earlier_runs(measured["cases of earlier runs"])
        ),
        data={
            "microseconds": cases,
            "best": measured["best"],
            "correctness": measured.get("correctness"),
            "distance from fp32": measured.get("distance from fp32"),
            "cases of earlier runs": measured["cases of earlier runs"],
            "failed": {key: value for key, value in measured.items() if key.endswith(" failed")},
        },
        provenance=provenance,
    )


def _average_case(measured: Case, rows: int) -> list[str | int | float] | None:
    """Return a row of geometric means over the shapes; None if a time is missing."""
    cases = measured["microseconds"]
    by_shape = {s: cases[f"{s}, rows {rows}"] for s in SHAPES if f"{s}, rows {rows}" in cases}
    if len(by_shape) < len(SHAPES):
        return None
    buckets = PARTS[measured["kernel"]].buckets
    bucket = next((size for size in buckets if rows <= size), None)
    configs = dict.fromkeys(SHAPES) | ({} if bucket is None else choose_configs(measured, bucket))
    ratios = {
        s: _find_fastest(case, PEERS) / (find_time(measured, s, rows, config) if config else before)
        for s, case in by_shape.items()
        for config, before in [(configs[s], _find_fastest(case, BEFORE))]
    }
    if not all(0 < ratio < math.inf for ratio in ratios.values()):
        return None  # a shape has no peer, or its configuration was not timed at these rows
    worst = min(ratios, key=lambda shape: ratios[shape])
    return [
        rows,
        geometric_mean(ratios.values()),
        f"{ratios[worst]:.2f} ({worst})",
        f"{sum(config is not None for config in configs.values())} of {len(SHAPES)}",
        _average_ratio(by_shape, KERNEL, PEERS),
        _average_ratio(by_shape, "own", PEERS),
        _average_ratio(by_shape, KERNEL, BEFORE),
        _average_ratio(by_shape, KERNEL, ("cublas",)),
    ]


def _note_earlier_runs(cases: Sequence[str]) -> str:
    rows = sorted({int(case.rsplit(" ", 1)[1]) for case in cases})
    if not rows:
        return ""
    return (
        " The run was cut off: for "
        + ", ".join(
            f"{count} rows ({sum(c.endswith(f' {count}') for c in cases)})" for count in rows
        )
        + " so many cases are of a run of an earlier version."
    )


def _find_fastest(case: Case, arms: Iterable[str]) -> float:
    return min(find_microseconds(case, arm) for arm in arms)


def _average_ratio(by_shape: Mapping[str, Case], arm: str, others: Iterable[str]) -> float:
    return geometric_mean(
        _find_fastest(case, others) / case[arm]["us"] for case in by_shape.values()
    )


if __name__ == "__main__":
    main()
