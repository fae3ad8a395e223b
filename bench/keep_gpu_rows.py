"""Keep what measure_gpu_rows.py wrote on a GPU machine: a result, and the shipped configurations.

    python bench/keep_gpu_rows.py gpu-rows.json --commit 0e60713 --date 2026-11-26
    python bench/keep_gpu_rows.py gpu-stream.json --commit 0e60713 --date 2026-11-26

A file says of which kernel it is. For each number of rows one thread block is shipped for all
shapes, the one with the best geometric mean, and another only for a shape on which it is 3% faster:
every one of them has to be compiled.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.kernels import cuda_rows, cuda_stream
from keep_gpu import TABLES, join_entries, name_sizes
from measure_gpu_kernels import SHAPES, find_microseconds
from record import Elsewhere, save_result

OWN = "own, early start"
BEFORE = ("as chosen", "triton", "dequantize + cublas")
PEERS = ("tinygemm", "marlin", "machete", "humming")
WORTH = 0.97
"""Of the common thread block's time: what another must be faster than."""

Case = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """Of the shipped table, and of the page, what a kernel's measurement fills."""

    name: str
    buckets: tuple[int, ...]
    tells_slower: bool
    """Whether a shape on which it is slower has an entry that says so."""


PARTS = {
    "rows": Part("many_rows", cuda_rows.BUCKETS, True),
    "stream": Part("stream", cuda_stream.BUCKETS, False),
}


def main() -> None:
    """Write the table and the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, nargs="+", help="the last run last")
    parser.add_argument("--commit", required=True, help="that was measured")
    parser.add_argument("--date", required=True, help="of the measurement")
    options = parser.parse_args()
    measured = join_runs([json.loads(run.read_text(encoding="utf-8")) for run in options.rows])
    keep_table(measured, options.date)
    keep_result(
        measured,
        Elsewhere(
            date=options.date,
            commit=options.commit,
            command=f"python bench/measure_gpu_rows.py --kernel {measured['kernel']}",
            machine=measured["machine"],
            versions=measured["versions"],
        ),
    )


def join_runs(runs: Sequence[Case]) -> Case:
    """Take the cases that the last run did not reach from the ones before.

    Args:
        runs: Of one GPU, the last one last.

    Returns:
        The last run with more cases.

    Raises:
        SystemExit: They are of several GPUs.
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


def keep_table(measured: Case, date: str) -> None:
    """Write the kernel's configurations into the architecture's table, and what they are of."""
    path = TABLES / f"{measured['architecture']}.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    kept = PARTS[measured["kernel"]]
    table["made_of"][kept.name] = f"{measured['device']}, {date}"
    table[kept.name] = [
        {**name_sizes(shape), "rows": rows, "config": config}
        for rows in kept.buckets
        for shape, config in choose_configs(measured, rows).items()
        if config is not None or kept.tells_slower
    ]
    lines = json.dumps(table, indent=1).splitlines()
    path.write_text("\n".join(join_entries(lines)) + "\n", encoding="utf-8")


def choose_configs(measured: Case, rows: int) -> dict[str, dict[str, int] | None]:
    """Choose the configuration of each shape; None where what halfbyte had before is faster."""
    keys = {shape: f"{shape}, rows {rows}" for shape in SHAPES}
    # A run that was cut off has the candidates of its last case, and nothing beside them.
    times = {
        shape: _by_block(measured["sweep"][key])
        for shape, key in keys.items()
        if key in measured["sweep"] and key in measured["microseconds"]
    }
    if not times:
        return {}
    blocks = set.intersection(*(set(case) for case in times.values()))
    common = min(blocks, key=lambda block: _mean(case[block][0] for case in times.values()))
    chosen: dict[str, dict[str, int] | None] = {}
    for shape, case in times.items():
        best = min(case, key=lambda block: case[block][0])
        block = best if case[best][0] < WORTH * case[common][0] else common
        config = case[block][1]
        before = _best(measured["microseconds"][keys[shape]], BEFORE)
        faster = find_time(measured, shape, rows, config) < before
        chosen[shape] = config if faster else None
    return chosen


def find_time(measured: Case, shape: str, rows: int, config: Mapping[str, int]) -> float:
    """Find a configuration's time beside the other tools' kernels.

    Args:
        measured: The run.
        shape: The layer's name.
        rows: Of x.
        config: Of the kernel.

    Returns:
        Microseconds; of another than the fastest, which alone was timed in turn with the others,
        the fastest one's by what the two took in the sweep. Infinity: it was not timed.
    """
    key = f"{shape}, rows {rows}"
    sweep = measured["sweep"][key]
    found = find_microseconds(sweep, json.dumps(config))
    return found / _best(sweep, sweep) * _best(measured["microseconds"][key], (OWN,))


def _by_block(case: Case) -> dict[str, tuple[float, dict[str, int]]]:
    """By thread block: the time of its best splits, and the configuration."""
    found: dict[str, tuple[float, dict[str, int]]] = {}
    for name in case:
        config = json.loads(name)
        block = json.dumps({field: value for field, value in config.items() if field != "splits"})
        time = find_microseconds(case, name)
        if math.isfinite(time) and (block not in found or time < found[block][0]):
            found[block] = time, config
    return found


def keep_result(measured: Case, elsewhere: Elsewhere) -> None:
    """Write the geometric means by number of rows."""
    part = PARTS[measured["kernel"]]
    cases = measured["microseconds"]
    humming = any("humming" in case for case in cases.values())
    table = []
    for rows in sorted({int(key.rsplit(" ", 1)[1]) for key in cases}):
        here = {s: cases[f"{s}, rows {rows}"] for s in SHAPES if f"{s}, rows {rows}" in cases}
        if len(here) < len(SHAPES):
            continue
        bucket = next((size for size in part.buckets if rows <= size), None)
        many = dict.fromkeys(SHAPES) | ({} if bucket is None else choose_configs(measured, bucket))
        ratios = {
            s: _best(case, PEERS) / (find_time(measured, s, rows, config) if config else before)
            for s, case in here.items()
            for config, before in [(many[s], _best(case, BEFORE))]
        }
        if not all(0 < ratio < math.inf for ratio in ratios.values()):
            continue  # a shape has no peer, or what is shipped was not timed at so many rows
        least = min(ratios, key=lambda shape: ratios[shape])
        table.append(
            [
                rows,
                _mean(ratios.values()),
                f"{ratios[least]:.2f} ({least})",
                f"{sum(config is not None for config in many.values())} of {len(SHAPES)}",
                _over(here, OWN, PEERS),
                _over(here, "own", PEERS),
                _over(here, OWN, BEFORE),
                _over(here, OWN, ("cublas",)),
            ]
        )
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
        rows=table,
        note=(
            "Speed as a ratio, above 1 is faster; geometric means over the eight linears of the 8B "
            "and the 70B Llama; 4 bits, groups of 128, symmetric, bf16. Peers: the fastest of vLLM "
            "0.24's Marlin and Machete and, up to 16 rows, torch's tinygemm"
            + (", and Humming 0.1.19," if humming else "")
            + " in each case. halfbyte: what it runs by its shipped table, which was made of this "
            "run, with early start. The kernel: the fastest of its candidates, timed again in turn "
            "with the others; where another is shipped, halfbyte is as much slower as that was "
            "among the candidates. Weights cold, CUDA graphs, medians of 7 rounds (3 for 4096 "
            "rows)." + _tell_earlier(measured["cases of earlier runs"])
        ),
        data={
            "microseconds": cases,
            "best": measured["best"],
            "correctness": measured.get("correctness"),
            "distance from fp32": measured.get("distance from fp32"),
            "cases of earlier runs": measured["cases of earlier runs"],
            "failed": {key: value for key, value in measured.items() if key.endswith(" failed")},
        },
        elsewhere=elsewhere,
    )


def _tell_earlier(cases: Sequence[str]) -> str:
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


def _best(case: Case, arms: Iterable[str]) -> float:
    return min(find_microseconds(case, arm) for arm in arms)


def _over(here: Mapping[str, Case], arm: str, others: Iterable[str]) -> float:
    return _mean(_best(case, others) / case[arm]["us"] for case in here.values())


def _mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return round(math.exp(sum(logs) / len(logs)), 3)


if __name__ == "__main__":
    main()
