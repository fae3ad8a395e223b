"""Compare halfbyte with other tools on SmolLM2-135M: quality, CPU time and memory.

    python bench/measure_quality.py [MODEL] [--text FILE] [--test FILE] [--bits 4]
        [--peers gptqmodel,llmcompressor,autoround] [--only NAME;NAME] [--samples 128]
        [--length 512] [--windows 10] [--threads 2] [--device cpu] [--jobs 1] [--seconds N]

All tools get the same token ids: the calibration text tokenized as a whole, without BOS, and cut in
order; one run of halfbyte gets its built-in mix instead. Each tool runs in its own process, whose
user time and peak memory are recorded, including imports. KL and perplexity are measured on windows
of 2048 tokens of the test text, KL also on the shipped texts of other kinds, in fp32 with weights
decoded from the files. Peers run in their environments of ``make interop`` (python -m
bench.peers.environments gptqmodel llmcompressor autoround); by default, all installed ones.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfbyte
from halfbyte.data import (
    EVALUATION_FILES,
    PROSE,
    calibration_text,
    evaluation_documents,
    evaluation_text,
)
from halfbyte.evaluate.divergence import DivergenceAccumulator, DivergenceResult
from halfbyte.evaluate.windows import split_windows, tokenize_text
from halfbyte.quant_config import PRESETS, CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize.calibration import load_calibration
from halfbyte.quantize.rotate import rotate
from halfbyte.sample_model import write_sample_model
from peers.environments import FOLDER, PEERS, PROGRAMS
from record import save_result

WINDOW = 2048
OTHER_WINDOW = 512
OTHERS = [kind for kind in EVALUATION_FILES if kind != PROSE]
COLUMNS = [
    *("KL, nats", "±"),
    *(f"KL, {kind}" for kind in OTHERS),
    *("perplexity", "same first choice", "user CPU, s", "wall, s", "peak, GB"),
]
MIX = ", built-in mix"
"""Suffix of cases that calibrate on the built-in mix."""
ROTATED = ", rotated"
"""Suffix of cases that rotate the model first (halfbyte rotate)."""
_128 = {"group_size": 128, "ragged_groups": True}
_64 = {"group_size": 64}
HALFBYTE_CASES: dict[str, dict[str, Any]] = {
    "halfbyte fast, group 128": _128,
    "halfbyte balanced, group 128": {**PRESETS["balanced"], **_128},
    "halfbyte best, group 128": {**PRESETS["best"], **_128},
    f"halfbyte balanced, group 128{MIX}": {**PRESETS["balanced"], **_128},
    f"halfbyte fast, group 128{ROTATED}": _128,
    f"halfbyte balanced, group 128{ROTATED}": {**PRESETS["balanced"], **_128},
    f"halfbyte best, group 128{ROTATED}": {**PRESETS["best"], **_128},
    "halfbyte fast, group 64": _64,
    "halfbyte balanced, group 64": {**PRESETS["balanced"], **_64},
    "halfbyte best, group 64": {**PRESETS["best"], **_64},
    f"halfbyte balanced, group 64{ROTATED}": {**PRESETS["balanced"], **_64},
    f"halfbyte best, group 64{ROTATED}": {**PRESETS["best"], **_64},
}
PEER_CASES = {
    "GPTQModel, group 128": ("gptqmodel", 128),
    "GPTQModel, group 64": ("gptqmodel", 64),
    # It refuses group sizes that do not divide a layer's width.
    "llm-compressor, group 64": ("llmcompressor", 64),
    "AutoRound, group 128": ("autoround", 128),
    "AutoRound, group 64": ("autoround", 64),
}
AUTOROUND_STEPS = 200
"""AutoRound's default."""


def main() -> None:
    """Quantize with every tool, measure all models, save one table."""
    known = dict.fromkeys(peer for peer, _ in PEER_CASES.values())
    installed = ",".join(name for name in known if PEERS[name].is_installed())
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="tools to run in parallel; with more than 1, times mean little",
    )
    parser.add_argument(
        "--seconds", type=float, help="time limit of a tool; beyond it, the tool is left out"
    )
    parser.add_argument(
        "--peers",
        default=installed,
        help="other tools, separated by commas (default: those installed)",
    )
    parser.add_argument("--only", help="names of cases, separated by semicolons (default: all)")
    parser.add_argument("--name", default="quality", help="name of the file in bench/results")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_halfbyte(**json.loads(args.child.read_text()))
        return
    for name in filter(None, args.peers.split(",")):
        if name not in known or not PEERS[name].is_installed():
            raise SystemExit(
                f"Cannot run {name}: its environment is not installed. "
                f"Run: python -m bench.peers.environments {name}"
            )
    tokenizer, ids, prose = prepare(args)
    mix = load_calibration(
        None, CalibrationConfig(samples=args.samples, length=args.length), tokenizer, None
    )
    windows = windows_by_kind(tokenizer, prose)
    with tempfile.TemporaryDirectory() as work:
        outcomes = run_tools(args, ids, [row.tolist() for row in mix.sequences], Path(work))
        runs = {name: run for name, run in outcomes.items() if run is not None}
        args.stopped = [name for name, run in outcomes.items() if run is None]
        if not runs:
            raise SystemExit(
                f"Nothing measured: no tool finished within {args.seconds} s. Raise --seconds."
            )
        folders = {name: Path(work) / run["folder"] for name, run in runs.items()}
        results = compare(args.model, folders, windows, args.device)
    report(args, len(ids), len(prose), runs, results)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all comparisons of quantized models share."""
    parser.add_argument("model", type=Path, nargs="?", help="default: the sample model")
    parser.add_argument("--text", type=Path, help="calibration text (default: built-in prose)")
    parser.add_argument("--test", type=Path, help="held-out text (default: built-in prose)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="where halfbyte and AutoRound compute")


def prepare(args: argparse.Namespace) -> tuple[Any, list[list[int]], Tensor]:
    """Set the threads; return the tokenizer, calibration ids and held-out windows."""
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    args.model = args.model or write_sample_model(FOLDER / "sample-model").folder
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = args.text.read_text() if args.text else calibration_text()
    held_out = args.test.read_text() if args.test else evaluation_text()
    rows = list(tokenize_text(tokenizer, text).split(args.length))[: args.samples]
    ids = [row.tolist() for row in rows if len(row) == args.length]
    windows = split_windows(tokenize_text(tokenizer, held_out), WINDOW, limit=args.windows).ids
    return tokenizer, ids, windows


def windows_by_kind(tokenizer: Any, prose: Tensor) -> dict[str, Tensor]:
    """Return windows by kind of text: the given prose, and the shipped texts of other kinds."""
    windows = {PROSE: prose}
    for kind in OTHERS:
        other = tokenize_text(tokenizer, "\n\n".join(evaluation_documents(kind)))
        windows[kind] = split_windows(other, OTHER_WINDOW).ids
    return windows


def run_tools(
    args: argparse.Namespace, ids: list[list[int]], mix: list[list[int]], work: Path
) -> dict[str, Any]:
    """Run every tool on the same ids, ``args.jobs`` at a time."""
    jobs: dict[str, tuple[str, dict[str, Any], list[str]]] = {}
    for number, (name, settings) in enumerate(HALFBYTE_CASES.items()):
        job = {"ids": mix if name.endswith(MIX) else ids, "config": {"bits": args.bits, **settings}}
        job["rotated"] = name.endswith(ROTATED)
        jobs[name] = (f"halfbyte-{number}", job, [sys.executable, __file__, "--child"])
    for number, (name, (peer, group_size)) in enumerate(PEER_CASES.items()):
        if peer not in args.peers.split(",") or (peer == "llmcompressor" and args.bits != 4):
            continue  # decode() reads its files only at 4 bits
        folder = f"{peer}-{number}"
        settings = {"bits": args.bits, "group_size": group_size}
        job = {
            "ids": ids,
            "group_size": group_size,
            "batch_size": 1 if peer == "gptqmodel" else 8,
            "iterations": AUTOROUND_STEPS,
            "runs": [{"output": str(work / folder), "settings": settings}],
        }
        program = PROGRAMS / f"{peer}_quantize.py"
        jobs[name] = (folder, job, [str(PEERS[peer].python), str(program)])
    chosen = args.only.split(";") if args.only else list(jobs)
    unknown = [name for name in chosen if name not in jobs]
    if unknown:
        raise SystemExit(f"Unknown case {unknown[0]!r}. Available: {'; '.join(jobs)}")
    shared = {"model": str(args.model), "device": args.device}
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {
            name: pool.submit(run_tool, work, folder, {**job, **shared}, command, args.seconds)
            for name, (folder, job, command) in jobs.items()
            if name in chosen
        }
        return {name: future.result() for name, future in running.items()}


def run_tool(
    work: Path, folder: str, job: dict[str, Any], command: list[str], limit: float | None = None
) -> dict[str, Any] | None:
    """Run one tool in its own process; return its costs, or None if it hit the time limit."""
    path = work / f"{folder}.json"
    path.write_text(json.dumps({**job, "output": str(work / folder)}))
    log = work / f"{folder}.log"
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, str(path)], stdout=output, stderr=subprocess.STDOUT, cwd=work
        )
        stop = threading.Timer(limit or threading.TIMEOUT_MAX, process.kill)
        stop.daemon = True
        stop.start()
        _, status, usage = os.wait4(process.pid, 0)
        stop.cancel()
    if status == signal.SIGKILL and limit and time.monotonic() - start >= limit:
        print(f"{folder} was stopped at the time limit of {limit:.0f} s", flush=True)
        return None
    if status:
        output_tail = log.read_text(errors="replace")[-4000:]
        raise SystemExit(f"{folder} failed with status {status}:\n{output_tail}")
    run = {
        "folder": folder,
        "user_seconds": usage.ru_utime,
        "wall_seconds": time.monotonic() - start,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
    }
    print(run, flush=True)
    return run


def run_halfbyte(
    model: str,
    output: str,
    ids: list[list[int]],
    config: dict[str, Any],
    device: str,
    *,
    rotated: bool = False,
) -> None:
    """Quantize in this process."""
    if rotated:
        model = rotate(model, f"{output}-rotated", device=device).output
    halfbyte.quantize(
        model,
        output,
        config=QuantConfig(**config),
        calibration=CalibrationConfig(samples=len(ids), length=len(ids[0])),
        resources=ResourceConfig(device=device),
        text=ids,
        quality=False,
    )


@torch.no_grad()
def compare(
    base: Path, folders: dict[str, Path], windows: dict[str, Tensor], device: str
) -> dict[str, dict[str, DivergenceResult]]:
    """Run all models window by window in fp32; return divergences by tool and kind of text."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device)
    models = {name: decode(base, folder).to(device) for name, folder in folders.items()}
    accumulators = {name: {kind: DivergenceAccumulator() for kind in windows} for name in folders}
    for kind, all_ids in windows.items():
        for ids in all_ids.to(device).split(1):
            expected = plain(ids).logits[0, :-1]
            for name, model in models.items():
                accumulators[name][kind].update(expected, model(ids).logits[0, :-1], ids[0, 1:])
    return {
        name: {kind: accumulator.result() for kind, accumulator in by_kind.items()}
        for name, by_kind in accumulators.items()
    }


def decode(base: Path, folder: Path) -> Any:
    """Load a quantized model of any tool as a dense fp32 model, decoded from its files."""
    labels = json.loads((folder / "config.json").read_text())["quantization_config"]
    if labels["quant_method"] == "gptq":
        return halfbyte.load(folder, dtype=torch.float32).dequantize(torch.float32)
    packed, suffix = load_file(folder / "model.safetensors"), ".weight_packed"
    weights = {
        f"{name.removesuffix(suffix)}.weight": unpack_compressed(packed, name.removesuffix(suffix))
        for name in packed
        if name.endswith(suffix)
    }
    if not weights:
        raise SystemExit(f"Cannot decode {folder}: it has no packed weights.")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if model.load_state_dict(weights, strict=False).unexpected_keys:
        raise SystemExit(f"Cannot decode {folder}: it has weights that {base} does not have.")
    return model


def unpack_compressed(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Decode a linear of llm-compressor: 4-bit codes plus 8, packed along in, low bits first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (tensors[f"{name}.weight_packed"][..., None] >> shifts) & 15
    scale = tensors[f"{name}.weight_scale"].float()
    grouped = codes.view(*scale.shape, -1).float() - 8
    weight = (grouped * scale[..., None]).flatten(1)
    if list(weight.shape) != tensors[f"{name}.weight_shape"].tolist():
        raise SystemExit(
            f"Cannot decode {name}: its shape is {list(weight.shape)}, not "
            f"{tensors[f'{name}.weight_shape'].tolist()}."
        )
    return weight


def report(
    args: argparse.Namespace,
    samples: int,
    windows: int,
    runs: dict[str, Any],
    results: dict[str, dict[str, DivergenceResult]],
) -> None:
    """Print and save the table."""
    rows = make_rows(runs, results)
    base = next(iter(results.values()))[PROSE].base.perplexity
    save_result(
        args.name,
        columns=["tool", *COLUMNS],
        rows=rows,
        note=describe(args, samples, windows, base),
        data={
            "runs": runs,
            "peers": {name: PEERS[name].package for name in args.peers.split(",") if name},
            "base_perplexity": base,
            "results": as_plain(results),
        },
    )


def as_plain(results: dict[str, dict[str, DivergenceResult]]) -> dict[str, dict[str, Any]]:
    """Convert results to plain dicts for JSON, by tool and kind of text."""
    return {
        name: {kind: result.to_dict() for kind, result in by_kind.items()}
        for name, by_kind in results.items()
    }


def make_rows(
    runs: dict[str, Any], results: dict[str, dict[str, DivergenceResult]]
) -> list[list[Any]]:
    """Return rows of a name and ``COLUMNS``; each is printed in case saving fails."""
    rows = []
    for name, by_kind in results.items():
        run, result = runs[name], by_kind[PROSE]
        rows.append(
            [
                name,
                round(result.kl_nats, 4),
                round(result.kl_standard_error or 0.0, 4),
                *(round(by_kind[kind].kl_nats, 4) for kind in OTHERS),
                round(result.quantized.perplexity, 3),
                round(result.top1_agreement, 4),
                round(run["user_seconds"], 1),
                round(run["wall_seconds"], 1),
                round(run["peak_gb"], 2),
            ]
        )
        print(rows[-1], flush=True)
    return rows


def describe(args: argparse.Namespace, samples: int, windows: int, base: float) -> str:
    """Return the note of the table."""
    names = (args.text, "built-in prose"), (args.test, "the held-out built-in prose")
    text, test = (path.name if path else other for path, other in names)
    return (
        f"{args.bits} bits, symmetric, {samples} x {args.length} calibration tokens of {text}, or "
        f"of the built-in mix where that is said; {windows} windows of {WINDOW} tokens of {test} "
        "(the same kind as the calibration, which flatters all but the mix), the other kinds in "
        f"windows of {OTHER_WINDOW}; group 128 with a ragged last group; base {base:.3f}; on "
        f"{args.device}, {args.threads} threads, {args.jobs} at a time; ± is the standard error "
        "over windows; user CPU seconds include each tool's imports; all tools compute in bf16; "
        f"AutoRound with its default of {AUTOROUND_STEPS} iterations"
        + (f"; stopped for their time: {', '.join(args.stopped)}" if args.stopped else "")
    )


if __name__ == "__main__":
    main()
