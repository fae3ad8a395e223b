"""Compare halfbyte with GPTQModel's backends on a CPU: prompt and generated tokens per second.

    python bench/measure_cpu_gptqmodel.py [NAME=FOLDER ...] [--rounds 2] [--backends A,B]

A 1B shape with random weights is generated. GPTQModel runs in its environment of ``make interop``,
each backend in bfloat16 and in float32. A backend that refuses the checkpoint, crashes or exceeds
the time limit is not in the table; the note names it, and the result has its error message. Arms
run in turn, each in its own process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from halfbyte.integrations.speed import measure_apart
from measure_cpu_models import NEW, PROMPT, SHAPE, measure_folder, split_pairs, write_gptq
from peers.environments import PEERS, PROGRAMS
from record import save_result

BACKENDS = (
    "GPTQ_TORCH_ATEN",
    "GPTQ_TORCH_CPU_AVX512",
    "GPTQ_TORCH_FUSED",
    "GPTQ_TORCH_INT8",
    "GPTQ_TORCH",
)
"""Backends of GPTQModel 7.7.0 for GPTQ on a CPU."""
DTYPES = ("bfloat16", "float32")
LIMIT_SECONDS = 300
"""Time limit for a backend to compile, load and generate."""


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--backends", default=",".join(BACKENDS))
    arguments = parser.parse_args()
    rows, data = [], {}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as made:
        models = {SHAPE: write_gptq(Path(made))} | split_pairs(arguments.models)
        # GPTQModel requires a tokenizer.
        words = Tokenizer(tokenizer_models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(made)
        for name, folder in models.items():
            arms: dict[str, list[dict[str, Any]]] = {"halfbyte": []}
            for _ in range(arguments.rounds):
                own = measure_apart(measure_folder, folder, 16)
                arms["halfbyte"].append({"prompt": own.prompt_rate, "rate": own.rate})
                for backend in arguments.backends.split(","):
                    for dtype in DTYPES:
                        found = arms.setdefault(f"GPTQModel {backend}, {dtype}", [])
                        if not found or "rate" in found[0]:
                            found.append(run_peer(folder, backend, dtype, Path(made)))
            rates = {arm: median(runs, "rate") for arm, runs in arms.items() if "rate" in runs[0]}
            if len(rates) == 1:
                raise SystemExit(f"Cannot compare: no backend of GPTQModel ran: {arms}")
            best = max(rate for arm, rate in rates.items() if arm != "halfbyte")
            for arm, rate in rates.items():
                rows.append([name, arm, median(arms[arm], "prompt"), rate, rate / best])
                print(*rows[-1], flush=True)
            left_out |= {
                arm: runs[0]["because"] for arm, runs in arms.items() if "because" in runs[0]
            }
            data[name] = arms
    print(left_out)
    save_result(
        "cpu-gptqmodel",
        columns=["model", "program", "prompt tok/s", "generated tok/s", "of GPTQModel's best"],
        rows=rows,
        note=f"4 bits, batch 1, {torch.get_num_threads()} threads; {PROMPT} prompt tokens, {NEW} "
        f"generated after them; medians of {arguments.rounds} rounds, arms in turn; the 1B shape "
        f"has random weights. Not run: {', '.join(sorted(left_out)) or 'none'}.",
        data=data,
    )


def median(found: list[dict[str, Any]], key: str) -> float:
    """Return the median of a quantity over the runs."""
    return statistics.median(run[key] for run in found)


def run_peer(folder: Path, backend: str, dtype: str, work: Path) -> dict[str, Any]:
    """Run GPTQModel once; return its rates, or why there are none."""
    output = work / "found.json"
    output.unlink(missing_ok=True)
    settings = {"prompt": PROMPT, "new": NEW, "repeats": 2, "output": str(output)}
    job = work / "job.json"
    job.write_text(
        json.dumps({"checkpoint": str(folder), "backend": backend, "dtype": dtype, **settings}),
        encoding="utf-8",
    )
    try:
        done = subprocess.run(
            [PEERS["gptqmodel"].python, PROGRAMS / "gptqmodel_speed.py", job],
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"because": f"not done after {LIMIT_SECONDS} s"}
    if done.returncode:
        return {"because": f"died: {done.stderr}"}
    result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    if "refused" in result:
        return {"because": f"refused: {result['refused']}"}
    return {
        "kernel": result["kernel"],
        "prompt": statistics.median(result["prompt"]),
        "rate": statistics.median(result["rate"]),
    }


if __name__ == "__main__":
    main()
