"""Measure the time of ``halfbyte compare`` for items of 200 tokens.

    python bench/measure_compare_speed.py BASE CANDIDATE [--items 64] [--length 200] [--threads 2]

Multiple-choice items (a prompt of that length, four choices of one to three tokens) run through
both models without cached answers. Wall and CPU time are scaled to 1,000 items; on a shared
machine, only CPU time is meaningful.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from halfbyte.data import evaluation_text
from halfbyte.evaluate.loading import load_tokenizer
from halfbyte.judge.compare import compare
from halfbyte.judge.setup import CompareConfig
from halfbyte.judge.tasks import Item
from record import save_result

CHOICES = (" the", " of the", " in the city", " and")


def main() -> None:
    """Make the items, compare both models, save the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.base)
    ids = tokenizer(evaluation_text(), add_special_tokens=False, verbose=False)["input_ids"]
    items = [
        Item(
            name=f"i{i}",
            prompt=tokenizer.decode(ids[i * args.length // 2 :][: args.length]),
            choices=CHOICES,
        )
        for i in range(args.items)
    ]
    with tempfile.TemporaryDirectory() as cache:
        start, cpu = time.monotonic(), time.process_time()
        result = compare(
            args.base,
            args.candidate,
            items=items,
            documents={},
            config=CompareConfig(edge_cases=False, noise_items=1),
            cache=cache,
        )
        wall, cpu = time.monotonic() - start, time.process_time() - cpu
    scale = 1000 / args.items
    rows = [
        [cost.name.rsplit("/", 1)[-1], round(scale * cost.seconds / 60, 1)] for cost in result.costs
    ]
    rows.append(["both, loading included", round(scale * wall / 60, 1)])
    note = (
        f"{args.items} items of {args.length} tokens with four choices measured, minutes scaled to "
        f"1,000; {args.threads} threads; processor time of both together "
        f"{scale * cpu / 60:.1f} minutes, {scale * cpu / 60 / args.threads:.1f} on "
        f"{args.threads} free cores"
    )
    print(rows, note)
    save_result(
        "compare-speed",
        columns=["model", "wall time for 1,000 items, minutes"],
        rows=rows,
        note=note,
        data={"wall_seconds": wall, "cpu_seconds": cpu, "items": args.items},
    )


if __name__ == "__main__":
    main()
