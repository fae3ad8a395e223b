"""Measure the gain and the cost of each quantization step, alone and combined.

    python bench/measure_ablation.py [MODEL] [--text FILE] [--test FILE] [--bits 4]
        [--group-size 128] [--tune-steps 200] [--end-to-end-steps 120] [--only NAME;NAME]

Token ids and metric are those of ``measure_quality.py``: KL to the base in fp32, with weights
decoded from the files.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from halfbyte.data import PROSE
from halfbyte.quant_config import PRESETS
from measure_quality import (
    COLUMNS,
    OTHER_WINDOW,
    WINDOW,
    add_common_arguments,
    as_plain,
    compare,
    make_rows,
    prepare,
    run_tool,
    windows_by_kind,
)
from record import save_result

SHARES = (0.0, 0.1, 0.2, 0.6)
"""Values of ``shrinkage`` to try, besides the preset's."""


def main() -> None:
    """Quantize with every set of steps, measure all models, save one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asymmetric", action="store_true")
    best = PRESETS["best"]
    parser.add_argument("--tune-steps", type=int, default=best["tune_steps"])
    parser.add_argument("--end-to-end-steps", type=int, default=best["end_to_end_steps"])
    parser.add_argument("--work", type=Path, help="folder that keeps the checkpoints")
    parser.add_argument("--only", help="names of cases, separated by semicolons")
    parser.add_argument("--name", default="ablation", help="name of the file in bench/results")
    args = parser.parse_args()
    tokenizer, ids, prose = prepare(args)
    windows = windows_by_kind(tokenizer, prose)
    chosen = cases(args.tune_steps, args.end_to_end_steps)
    if args.only:
        chosen = {name: chosen[name] for name in args.only.split(";")}
    program = str(Path(__file__).with_name("measure_quality.py"))
    runs: dict[str, Any] = {}
    with ExitStack() as stack:
        work = args.work or stack.enter_context(tempfile.TemporaryDirectory())
        Path(work).mkdir(parents=True, exist_ok=True)
        for number, (name, steps) in enumerate(chosen.items()):
            config = {
                "bits": args.bits,
                "group_size": args.group_size,
                "symmetric": not args.asymmetric,
                "ragged_groups": True,
                **steps,
            }
            job = {"model": str(args.model), "ids": ids, "config": config, "device": args.device}
            command = [sys.executable, program, "--child"]
            run = run_tool(Path(work), f"case-{number}", job, command)
            assert run is not None, "runs have no time limit"
            runs[name] = run
        folders = {name: Path(work) / run["folder"] for name, run in runs.items()}
        results = compare(args.model, folders, windows, args.device)
    rows = make_rows(runs, results)
    base = next(iter(results.values()))[PROSE].base.perplexity
    save_result(
        args.name,
        columns=["steps", *COLUMNS],
        rows=rows,
        note=f"{args.bits} bits, group {args.group_size}; where there is training: "
        f"{args.tune_steps} steps a block, {args.end_to_end_steps} end to end at most; "
        f"{len(ids)} x {args.length} calibration tokens; {len(prose)} windows "
        f"of {WINDOW} held-out tokens, the other kinds in windows of {OTHER_WINDOW}; "
        f"base {base:.3f}; {args.threads} threads; ± is the standard error over windows",
        data={"runs": runs, "results": as_plain(results)},
    )


def cases(tune_steps: int, whole_steps: int) -> dict[str, dict[str, Any]]:
    """Return every set of steps by name."""
    base = {"match_base": True}
    weighed = {"weigh_tokens": True}
    balanced = {**base, "polish": 1}
    tuned = {**balanced, "tune_steps": tune_steps}
    return {
        "stored order instead of act-order": {"act_order": False},
        "more damping instead of shrinkage": {"shrinkage": 0.0, "damping": 0.1},
        **{f"fast, shrinkage {share}": {"shrinkage": share} for share in SHARES},
        "fast": {},
        "fast + polish": {"polish": 1},
        "fast + base": base,
        "fast + weighed tokens": weighed,
        "balanced: base and polish": balanced,
        **{f"balanced, shrinkage {share}": {**balanced, "shrinkage": share} for share in SHARES},
        "balanced + weighed tokens": {**balanced, **weighed},
        "fast + base + tuning": {**base, "tune_steps": tune_steps},
        "balanced + tuning": tuned,
        "balanced + weighed tokens + tuning": {**tuned, **weighed},
        "balanced + end to end": {**balanced, "end_to_end_steps": whole_steps},
        "best: all of it": {**tuned, **weighed, "end_to_end_steps": whole_steps},
    }


if __name__ == "__main__":
    main()
