"""Halfbyte beside GPTQModel on SmolLM2-135M: quality in the same measure, and processor time.

    python bench/measure_quality.py MODEL [--calibration FILE] [--text FILE]
        [--gptqmodel PYTHON] [--samples 128] [--length 512] [--windows 10] [--threads 2]

Both tools get the same token ids: the calibration text tokenised whole, without BOS, cut in order.
Each runs in a process of its own, whose user time and peak memory count, imports included. KL and
perplexity are measured on windows of 2048 tokens of the other text, in fp32, with the weights
decoded from the files. GPTQModel runs where ``--gptqmodel`` names a Python that has it
(``make interop`` makes one).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfbyte
from halfbyte.data import calibration_text, evaluation_text
from halfbyte.evaluate.divergence import DivergenceAccumulator, DivergenceResult
from halfbyte.evaluate.windows import split_windows, tokenize_text
from halfbyte.quant_config import CalibrationConfig, QuantConfig
from record import save_result

WINDOW = 2048
HALFBYTE_CASES = {
    "halfbyte, group 128 (last group ragged)": {"group_size": 128, "ragged_groups": True},
    "halfbyte, group 64": {"group_size": 64},
}
GPTQMODEL_CASE = "GPTQModel, default, group 128 (last group ragged)"

GPTQMODEL_PROGRAM = """
import json, os, sys
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

def main():
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    job = json.loads(open(sys.argv[1]).read())
    model = GPTQModel.load(job["model"], QuantizeConfig(bits=4, group_size=128), device="cpu")
    ids = [torch.tensor([row]) for row in job["ids"]]
    model.quantize(
        [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids], batch_size=1
    )
    model.save(job["output"])

if __name__ == "__main__":
    main()
"""


def main() -> None:
    """Quantize with every tool, measure all of them, save one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--calibration", type=Path, help="text (default: the built-in one)")
    parser.add_argument("--text", type=Path, help="held-out text (default: the built-in one)")
    parser.add_argument("--gptqmodel", help="Python of an environment that has gptqmodel")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_halfbyte(**json.loads(args.child.read_text()))
        return
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = args.calibration.read_text() if args.calibration else calibration_text()
    held_out = args.text.read_text() if args.text else evaluation_text()
    rows = list(tokenize_text(tokenizer, text).split(args.length))[: args.samples]
    ids = [row.tolist() for row in rows if len(row) == args.length]
    windows = split_windows(tokenize_text(tokenizer, held_out), WINDOW, limit=args.windows).ids
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as work:
        runs = run_tools(args, ids, Path(work))
        results = {
            name: compare(args.model, Path(work) / run["folder"], windows)
            for name, run in runs.items()
        }
    report(args, runs, results)


def run_tools(args: argparse.Namespace, ids: list[list[int]], work: Path) -> dict[str, Any]:
    """Run every tool on the same ids, one after the other."""
    runs: dict[str, Any] = {}
    for number, (name, config) in enumerate(HALFBYTE_CASES.items()):
        job = {"model": str(args.model), "ids": ids, "config": config}
        runs[name] = run_tool(
            work, f"halfbyte-{number}", job, [sys.executable, __file__, "--child"]
        )
    if args.gptqmodel:
        program = work / "gptqmodel_program.py"
        program.write_text(GPTQMODEL_PROGRAM)
        job = {"model": str(args.model), "ids": ids}
        runs[GPTQMODEL_CASE] = run_tool(work, "gptqmodel", job, [args.gptqmodel, str(program)])
    return runs


def run_tool(work: Path, folder: str, job: dict[str, Any], command: list[str]) -> dict[str, Any]:
    """Run one tool in a process of its own and account for it."""
    path = work / f"{folder}.json"
    path.write_text(json.dumps({**job, "output": str(work / folder)}))
    start = time.monotonic()
    process = subprocess.Popen([*command, str(path)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{folder} ended with status {status}")
    run = {
        "folder": folder,
        "user_seconds": usage.ru_utime,
        "wall_seconds": time.monotonic() - start,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
    }
    print(run, flush=True)
    return run


def run_halfbyte(model: str, output: str, ids: list[list[int]], config: dict[str, Any]) -> None:
    """Quantize in this process."""
    halfbyte.quantize(
        model,
        output,
        config=QuantConfig(**config),
        calibration=CalibrationConfig(samples=len(ids), length=len(ids[0])),
        text=ids,
        quality=False,
    )


@torch.no_grad()
def compare(base: Path, quantized: Path, windows: torch.Tensor) -> DivergenceResult:
    """Run both models window by window in fp32, weights decoded from the files."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    decoded = halfbyte.load(quantized, dtype=torch.float32).dequantize(torch.float32)
    accumulator = DivergenceAccumulator()
    for ids in windows.split(1):
        accumulator.update(plain(ids).logits[0, :-1], decoded(ids).logits[0, :-1], ids[0, 1:])
    return accumulator.result()


def report(
    args: argparse.Namespace, runs: dict[str, Any], results: dict[str, DivergenceResult]
) -> None:
    """Print and save the table."""
    columns = ["tool", "KL, nats", "±", "perplexity", "same first choice", "user CPU, s"]
    columns += ["wall, s", "peak, GB"]
    rows = []
    for name, result in results.items():
        run = runs[name]
        rows.append(
            [
                name,
                round(result.kl_nats, 4),
                round(result.kl_standard_error or 0.0, 4),
                round(result.quantized.perplexity, 3),
                round(result.top1_agreement, 4),
                round(run["user_seconds"], 1),
                round(run["wall_seconds"], 1),
                round(run["peak_gb"], 2),
            ]
        )
        print(rows[-1], flush=True)
    base = next(iter(results.values())).base.perplexity
    save_result(
        "quality",
        columns=columns,
        rows=rows,
        note=f"4 bits, symmetric, {args.samples} x {args.length} calibration tokens of WikiText-2 "
        f"(validation split); {args.windows} windows of {WINDOW} tokens of its test split (same "
        f"kind of text, which flatters all of them); base {base:.3f}; {args.threads} threads; "
        "± is the standard error over windows",
        data={
            "runs": runs,
            "base_perplexity": base,
            "results": {name: result.to_dict() for name, result in results.items()},
        },
    )


if __name__ == "__main__":
    main()
