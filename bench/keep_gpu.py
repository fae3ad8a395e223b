"""Turn GPU measurements into results for the docs and the kernels' shipped table.

    python bench/keep_gpu.py --kernels gpu-kernels.json --commit 0e60713 --date 2026-11-26
    python bench/keep_gpu.py --decode gpu-decode.json --commit 0e60713 --date 2026-11-26
    python bench/keep_gpu.py --humming gpu-kernels.json --commit 3db08fc --date 2026-11-26

The measuring scripts run on a machine without the repository; this script converts their output to
``bench/results/`` and ``src/halfbyte/kernels/gpu_table/``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpu_timing import SHAPES
from halfbyte.kernels.triton_configs import RULES
from halfbyte.kernels.triton_linear import ROWS_LIMIT
from measure_gpu_kernels import ROWS
from record import Provenance, save_result

TABLES = Path(__file__).parents[1] / "src" / "halfbyte" / "kernels" / "gpu_table"
PEERS = ("tinygemm", "marlin", "machete", "humming")
SHOWN_ROWS = (1, 16, 64, 4096)

Case = Mapping[str, Any]


def main() -> None:
    """Write the given measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", type=Path, help="output of measure_gpu_kernels.py")
    parser.add_argument("--decode", type=Path, help="output of measure_gpu_decode.py")
    parser.add_argument("--humming", type=Path, help="output of measure_gpu_kernels.py --humming")
    parser.add_argument(
        "--suffix", default="", metavar="_GPU", help="appended to the decode result's name"
    )
    parser.add_argument("--commit", required=True, help="commit that was measured")
    parser.add_argument("--date", required=True, help="date of the measurement")
    options = parser.parse_args()
    if options.kernels:
        measured = json.loads(options.kernels.read_text(encoding="utf-8"))
        write_table(measured, options.date)
        save_kernels(measured, _describe_run(measured, options, "measure_gpu_kernels.py"))
    if options.decode:
        measured = json.loads(options.decode.read_text(encoding="utf-8"))
        provenance = _describe_run(measured, options, "measure_gpu_decode.py")
        save_decode(measured, provenance, f"gpu-decode{options.suffix}")
    if options.humming:
        measured = json.loads(options.humming.read_text(encoding="utf-8"))
        provenance = _describe_run(measured, options, "measure_gpu_kernels.py --humming")
        save_humming(measured, provenance)


def _describe_run(measured: Case, options: argparse.Namespace, script: str) -> Provenance:
    return Provenance(
        date=options.date,
        commit=options.commit,
        command=f"python bench/{script}",
        machine=measured["machine"],
        versions=measured["versions"],
    )


# ------------------------------------------------------------------- the shipped table


def write_table(measured: Case, date: str) -> None:
    """Write the best configurations, and up to how many rows the CUDA kernel is faster."""
    best = measured["best"]

    def entries(tier: str) -> list[dict[str, Any]]:
        return [
            {
                **name_sizes(shape),
                "rows": rows,
                "config": json.loads(best[tier][f"{shape}, rows {rows}"]),
            }
            for shape in SHAPES
            for rows in (8, *RULES)
            if f"{shape}, rows {rows}" in best[tier]
        ]

    table = {
        "made_by": "bench/keep_gpu.py",
        "made_of": dict.fromkeys(("triton", "cuda", "cuda_rows"), f"{measured['device']}, {date}"),
        "triton": entries("triton"),
        "cuda": entries("cuda"),
        "cuda_rows": [
            {**name_sizes(shape), "rows": find_cuda_rows(measured, shape)} for shape in SHAPES
        ],
    }
    TABLES.mkdir(exist_ok=True)
    path = TABLES / f"{measured['architecture']}.json"
    if path.is_file():  # keep parts that keep_gpu_rows.py wrote
        before = json.loads(path.read_text(encoding="utf-8"))
        for part in ("many_rows", "stream"):
            if part in before:
                table[part], table["made_of"][part] = before[part], before["made_of"][part]
    lines = json.dumps(table, indent=1)
    # One entry per line keeps a table of a hundred entries readable, also in diffs.
    lines = "\n".join(join_entries(lines.splitlines()))
    path.write_text(lines + "\n", encoding="utf-8")


def join_entries(lines: Iterable[str]) -> Iterable[str]:
    """Yield the lines of a table with each entry joined to one line."""
    entry: list[str] = []
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if depth >= 3 or (entry and depth == 2):
            entry.append(line.strip())
            if depth == 2:
                yield "  " + " ".join(entry)
                entry = []
        elif depth == 2 and line.strip() == "{":
            entry = [line.strip()]
        else:
            yield line


def name_sizes(shape: str) -> dict[str, int]:
    """Return the sizes of a shape by name."""
    return dict(zip(("in_features", "out_features"), SHAPES[shape], strict=True))


def find_cuda_rows(measured: Case, shape: str) -> int:
    """Return up to how many rows the CUDA kernel, with early start, beats the Triton kernel."""
    rows_list = [rows for rows in ROWS if rows <= 64]
    faster = 0
    for rows in rows_list:
        case = measured["microseconds"][f"{shape}, rows {rows}"]
        if case["cuda, early start"]["us"] > case["triton"]["us"]:
            break
        faster = rows
    return faster


# ------------------------------------------------------------------------- the results


def save_kernels(measured: Case, provenance: Provenance) -> None:
    """Save the geometric means, and the times by layer."""
    cases = measured["microseconds"]
    cuda_rows = {shape: find_cuda_rows(measured, shape) for shape in SHAPES}
    save_result(
        "gpu-kernels",
        columns=[
            "rows of x",
            "halfbyte over the best peer",
            "the least",
            "a peer is faster on",
            "CUDA kernel without early start",
            "Triton programs",
            "halfbyte over bf16 cuBLAS",
        ],
        rows=[_average_case(cases, cuda_rows, rows) for rows in ROWS],
        note=(
            "Speed as a ratio, above 1 is faster; geometric means over the eight linears of the 8B "
            "and the 70B Llama; 4 bits, groups of 128, symmetric, bf16. Peers: the fastest of "
            "vLLM 0.24's Marlin and Machete and torch's tinygemm in each case; Humming is not "
            "measured. halfbyte as it chooses by rows: its CUDA kernel with early start, Triton, "
            "or dequantize and cuBLAS. Weights cold, CUDA graphs, arms in turn, medians of 7 "
            "rounds (3 for 4096 rows). Early start flatters: the launches of a graph do not "
            "depend on each other here, and peers do not use it."
        ),
        data={
            "microseconds": cases,
            "sweep": _shorten(measured["sweep"]),
            "correctness": measured.get("correctness"),
            "failed": {key: value for key, value in measured.items() if key.endswith(" failed")},
        },
        provenance=provenance,
    )
    save_result(
        "gpu-layers",
        columns=["layer", "rows", "halfbyte", "by", "tinygemm", "Marlin", "Machete", "bf16 cuBLAS"],
        rows=_list_layers(cases, cuda_rows),
        note="Microseconds; the same run as the table above.",
        data={},
        provenance=provenance,
    )


def _average_case(
    cases: Mapping[str, Case], cuda_rows: Mapping[str, int], rows: int
) -> list[str | int | float]:
    """Return a row of geometric means over the shapes."""
    by_shape = {shape: cases[f"{shape}, rows {rows}"] for shape in SHAPES}
    times = {s: case[choose_arm(rows, cuda_rows[s])]["us"] for s, case in by_shape.items()}
    ratios = {s: find_peer(case)[1] / times[s] for s, case in by_shape.items()}
    worst = min(ratios, key=lambda shape: ratios[shape])
    return [
        rows,
        geometric_mean(ratios.values()),
        f"{ratios[worst]:.2f} ({worst})",
        f"{sum(ratio < 1 for ratio in ratios.values())} of {len(SHAPES)}",
        _average_over_peers(by_shape, "cuda"),
        _average_over_peers(by_shape, "triton"),
        geometric_mean(case["cublas"]["us"] / times[s] for s, case in by_shape.items()),
    ]


def _list_layers(
    cases: Mapping[str, Case], cuda_rows: Mapping[str, int]
) -> list[list[str | int | float]]:
    """Return a row of microseconds for each shape and number of rows that is shown."""
    table: list[list[str | int | float]] = []
    for shape, (in_features, out_features) in SHAPES.items():
        for rows in SHOWN_ROWS:
            case, arm = cases[f"{shape}, rows {rows}"], choose_arm(rows, cuda_rows[shape])
            peers = [case[peer]["us"] if peer in case else "—" for peer in (*PEERS[:3], "cublas")]
            name = f"{shape} {in_features} → {out_features}"
            table.append([name, rows, case[arm]["us"], arm, *peers])
    return table


def choose_arm(rows: int, cuda_rows: int) -> str:
    """Return the arm that halfbyte selects for this many rows."""
    if rows <= cuda_rows:
        return "cuda, early start"
    return "triton" if rows <= ROWS_LIMIT else "dequantize + cublas"


def find_peer(case: Case) -> tuple[str, float]:
    """Return the fastest peer and its microseconds."""
    times = {peer: case[peer]["us"] for peer in PEERS if isinstance(case.get(peer), dict)}
    best = min(times, key=lambda peer: times[peer])
    return best, times[best]


def _average_over_peers(by_shape: Mapping[str, Case], arm: str) -> float | str:
    if not all(arm in case for case in by_shape.values()):
        return "—"
    return geometric_mean(find_peer(case)[1] / case[arm]["us"] for case in by_shape.values())


def geometric_mean(ratios: Iterable[float]) -> float:
    """Return the geometric mean, rounded to three digits."""
    logs = [math.log(ratio) for ratio in ratios]
    return round(math.exp(sum(logs) / len(logs)), 3)


def _shorten(sweep: Case) -> dict[str, dict[str, list[str]]]:
    """List configurations and their microseconds by tier and case, fastest first."""
    return {
        tier: {
            key: [
                f"{' '.join(map(str, json.loads(config).values()))}: {found['us']}"
                for config, found in sorted(_timed(case), key=lambda pair: pair[1]["us"])
            ]
            for key, case in cases.items()
        }
        for tier, cases in sweep.items()
    }


def _timed(case: Case) -> list[tuple[str, Any]]:
    return [(name, found) for name, found in case.items() if isinstance(found, dict)]


def _name_arm(arm: str, found: Case) -> str:
    """Name an arm; one that fell back to Transformers' forward is marked."""
    fell_back = found.get("own_forward_because") and not {"own", "compiled"} & {*arm.split()}
    return f"{arm} own" if fell_back else arm


def save_humming(measured: Case, provenance: Provenance) -> None:
    """Save the times next to Humming's, and each one's share of the read bandwidth."""
    speed = max(v for name, v in measured["terabytes_per_second"].items() if "read" in name)
    cases = measured["microseconds beside humming"]
    rows = []
    for name, case in cases.items():
        shape, _, count = name.partition(", rows ")
        bits = SHAPES[shape][0] * SHAPES[shape][1] * (4 + 16 / 128)
        kernels = ("cuda, early start", "triton")
        chosen = min((arm for arm in kernels if arm in case), key=lambda arm: case[arm]["us"])
        times = [case[arm]["us"] for arm in (chosen, "cuda", "triton", "humming")]
        shares = [bits / 8 / us / 1e6 / speed for us in (times[0], times[-1])]
        rows.append(
            [
                f"{shape} {SHAPES[shape][0]} → {SHAPES[shape][1]}",
                int(count),
                *times,
                round(times[-1] / times[0], 3),
                *(round(share, 3) for share in shares),
            ]
        )
    save_result(
        "gpu-humming",
        columns=[
            "layer", "rows", "halfbyte, µs", "CUDA kernel without early start", "Triton program",
            "Humming, µs", "Humming over halfbyte", "halfbyte's share of read bandwidth",
            "Humming's",
        ],
        rows=rows,
        note=(
            f"4 bits, groups of 128, symmetric, bf16; {speed:.2f} TB/s read beside it. halfbyte: "
            "the faster of its CUDA kernel with early start and its Triton program, by the table "
            "for an H100; the kernel for many rows is not among them. Weights cold, CUDA graphs, "
            "arms in turn, medians of 7 rounds. The run was cut off before the other layers. "
            "Humming 0.1.19, which quantizes the weight itself: its times compare, its results do "
            "not. Early start flatters: the launches do not depend on each other here."
        ),
        data={key: measured[key] for key in ("terabytes_per_second", "peers left out")}
        | {"microseconds": cases},
        provenance=provenance,
    )  # fmt: skip


def save_decode(measured: Case, provenance: Provenance, claim: str) -> None:
    """Save the time of a decode step."""
    save_result(
        claim,
        columns=["arm", "ms a token", "tokens/s", "tokens/s, each given to the CPU"],
        rows=[
            [
                _name_arm(arm, found),
                found["ms"],
                found["tokens_per_second"],
                round(1e3 / found["ms_with_host"], 1),
            ]
            for arm, found in measured["arms"].items()
            if isinstance(found, dict)
        ],
        note=(
            f"Llama of the 8B shape, {measured['layers']} blocks, random weights, batch 1, "
            f"{measured['context']} tokens in a static cache, a step as a CUDA graph; the head in "
            "bf16. cuda: 4 bits, groups of 128; own: Transformers' own forward recorded instead of "
            "halfbyte's step of few launches; compiled: that through torch.compile."
        ),
        data=dict(measured),
        provenance=provenance,
    )


if __name__ == "__main__":
    main()
