"""What does each step of quantizing bring, alone and in sequence, and what does it cost?

    python bench/measure_ablation.py [MODEL] [--text FILE] [--test FILE] [--bits 4]
        [--group-size 128] [--tune-steps 200] [--only NAME,NAME]

Same token ids, same measure as ``measure_quality.py``: KL to the base in fp32, weights decoded from
the files.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from halfbyte.data import PROSE, calibration_text, evaluation_text
from halfbyte.evaluate.windows import split_windows, tokenize_text
from halfbyte.sample_model import write_sample_model
from measure_quality import WINDOW, compare, run_tool
from peers.environments import FOLDER
from record import save_result

COST = ("wall, s", "user CPU, s", "peak, GB")


def main() -> None:
    """Quantize with every set of steps, measure all, save one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", help="default: the sample model")
    parser.add_argument("--text", type=Path, help="calibration text (default: the built-in one)")
    parser.add_argument("--test", type=Path, help="held-out text (default: the built-in one)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--tune-steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="keep the checkpoints in this folder")
    parser.add_argument("--only", help="names of cases, with commas")
    parser.add_argument("--name", default="ablation", help="of the file in bench/results")
    args = parser.parse_args()
    args.model = args.model or write_sample_model(FOLDER / "sample-model").folder
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = args.text.read_text() if args.text else calibration_text()
    held_out = args.test.read_text() if args.test else evaluation_text()
    rows = list(tokenize_text(tokenizer, text).split(args.length))[: args.samples]
    ids = [row.tolist() for row in rows if len(row) == args.length]
    windows = split_windows(tokenize_text(tokenizer, held_out), WINDOW, limit=args.windows).ids
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    chosen = cases(args.tune_steps)
    if args.only:
        chosen = {name: chosen[name] for name in args.only.split(",")}
    program = str(Path(__file__).with_name("measure_quality.py"))
    runs: dict[str, Any] = {}
    with ExitStack() as stack:
        work = args.work or stack.enter_context(tempfile.TemporaryDirectory())
        for number, (name, steps) in enumerate(chosen.items()):
            config = {
                "bits": args.bits,
                "group_size": args.group_size,
                "symmetric": not args.asymmetric,
                "ragged_groups": True,
                **steps,
            }
            job = {"model": str(args.model), "ids": ids, "config": config}
            command = [sys.executable, program, "--child"]
            runs[name] = run_tool(Path(work), f"case-{number}", job, command)
        folders = {name: Path(work) / run["folder"] for name, run in runs.items()}
        compared = compare(args.model, folders, {PROSE: windows})
        results = {name: by_kind[PROSE] for name, by_kind in compared.items()}
    rows_out = [
        [
            name,
            round(result.kl_nats, 4),
            round(result.kl_standard_error or 0.0, 4),
            round(result.quantized.perplexity, 3),
            round(result.top1_agreement, 4),
            round(runs[name]["wall_seconds"], 1),
            round(runs[name]["user_seconds"], 1),
            round(runs[name]["peak_gb"], 2),
        ]
        for name, result in results.items()
    ]
    for row in rows_out:
        print(row, flush=True)
    base = next(iter(results.values())).base.perplexity
    save_result(
        args.name,
        columns=["steps", "KL, nats", "±", "perplexity", "same first choice", *COST],
        rows=rows_out,
        note=f"{args.bits} bits, group {args.group_size}, {args.tune_steps} tuning steps where "
        f"there is tuning; {len(ids)} x {args.length} calibration tokens; {len(windows)} windows "
        f"of {WINDOW} held-out tokens; base {base:.3f}; "
        f"{args.threads} threads; ± is the standard error over windows",
        data={"runs": runs, "results": {n: r.to_dict() for n, r in results.items()}},
    )


def cases(tune_steps: int) -> dict[str, dict[str, Any]]:
    """Name every set of steps."""
    base = {"match_base": True}
    return {
        "stored order instead of act-order": {"act_order": False},
        "fast": {},
        "fast + polish": {"polish": 1},
        "fast + base": base,
        "balanced: base and polish": {**base, "polish": 1},
        "fast + base + tuning": {**base, "tune_steps": tune_steps},
        "best: base and polish and tuning": {
            **base,
            "polish": 1,
            "tune_steps": tune_steps,
        },
    }


if __name__ == "__main__":
    main()
