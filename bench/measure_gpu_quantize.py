"""Measure and profile quantizing an 8B-shaped model on a GPU.

A Llama of the 8B shape with random bf16 weights (nothing is downloaded) is written to disk and
quantized with a preset, including all steps of a user's run: quality, reload, report. The floor is
the time of the required operations at the rates of this GPU's matrix products, measured just
before.

    python bench/measure_gpu_quantize.py --folder /fast/disk --output gpu-quantize.json
    python bench/measure_gpu_quantize.py --blocks 4                  fewer blocks
    python bench/measure_gpu_quantize.py --memory 12GB auto          one run per limit
    python bench/measure_gpu_quantize.py --shape tiny --device cpu   smoke test
    python bench/measure_gpu_quantize.py --keep-from FILE --commit 0e60713 --date 2026-11-26

The file is rewritten after every block, so that an interrupted run leaves partial results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import halfbyte
from block_timer import BlockTimer, SyncedMeter, TimeLimitReached, read_peaks, synchronize
from halfbyte.machine.arithmetic import find_fp32_sum_obstacle
from halfbyte.machine.facts import installed_versions, machine_facts
from halfbyte.quant_config import CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize import run as run_module
from halfbyte.quantize.columns import find_kernel_obstacle
from record import Provenance, save_result

SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 512,
    },
}
FULL_BLOCKS = 32
WEIGHT_SPREAD = 0.02
"""Standard deviation of the random weights, as Transformers initializes a Llama."""


def make_model(folder: Path, shape: dict[str, Any], blocks: int, device: torch.device) -> None:
    """Write a model folder, one shard per block, with weights sampled on the device."""
    config = LlamaConfig(
        num_hidden_layers=blocks,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        **shape,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        sizes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator(device=device).manual_seed(0)
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, size in sizes.items():
        number = name.split(".")[2] if name.startswith("model.layers.") else "outside"
        parts.setdefault(number, {})[name] = size
    weight_map = {}
    for number, (part, members) in enumerate(parts.items(), 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {}
        for name, size in members.items():
            values = torch.ones(size, dtype=torch.bfloat16, device=device)
            if len(size) > 1:
                values.normal_(0, WEIGHT_SPREAD, generator=generator)
            tensors[name] = values.cpu()
            weight_map[name] = file
        save_file(tensors, folder / file, {"format": "pt"})
        print(f"wrote {part}", end=" ", flush=True)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    make_tokenizer().save_pretrained(folder)
    print(flush=True)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte, which suffices to run the held-out text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def measure_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the median rate of square matrix products. Unit: FLOP/s."""
    size = 8192 if device.type == "cuda" else 512
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(12):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(left, right)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[2:])


def summarize(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Add the floor, its ratio, and the time of a whole model to a run's results."""
    blocks = [b["seconds"] for b in results["blocks"] if "profiled" not in b]
    done = len(results["blocks"])
    if not blocks or not done:
        return
    rates = results["rates"]
    by = {"forward": rates["bf16"], "Hessians": rates["bf16"], "solve": rates["fp32"]}
    flops = {kind: value for kind, value in SyncedMeter.last.flops.items() if kind in by}
    floor = {kind: value / by[kind] / done for kind, value in flops.items()}
    typical = statistics.median(blocks)
    # The reload check also grows with the blocks; scaling all of it overestimates slightly.
    reload = results["seconds_by_phase"].get("reload", 0.0) / done
    outside = results["seconds"] - sum(b["seconds"] for b in results["blocks"])
    results["summary"] = {
        "blocks_done": done,
        "median_block_seconds": round(typical, 3),
        "first_block_seconds": results["blocks"][0]["seconds"],
        "outside_blocks_seconds": round(outside, 3),
        "flops_per_block": {kind: value / done for kind, value in flops.items()},
        "floor_seconds_per_block": {kind: round(value, 4) for kind, value in floor.items()},
        "block_over_floor": round(typical / sum(floor.values()), 2),
        "floor_seconds_full": round(FULL_BLOCKS * sum(floor.values()), 2),
        "measured_whole_run": results["finished"] and options.blocks == FULL_BLOCKS,
        "seconds_full": round(results["seconds"] + (FULL_BLOCKS - done) * (typical + reload), 1),
        **read_peaks(torch.device(options.device)),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make the model, and quantize it within each memory limit."""
    device = torch.device(options.device)
    SyncedMeter.device = device
    results: dict[str, Any] = {
        "machine": machine_facts(),
        "versions": installed_versions(),
        "options": {k: str(v) for k, v in vars(options).items()},
        "runs": {},
    }
    for folder in (options.folder, options.output.parent):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    base = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        started = time.perf_counter()
        (base / "model").mkdir()
        make_model(base / "model", SHAPES[options.shape], options.blocks, device)
        results["seconds_to_make"] = round(time.perf_counter() - started, 1)
        results["rates"] = {
            "bf16": measure_rate(torch.bfloat16, device),
            "fp32": measure_rate(torch.float32, device),
        }
        results["column_program"] = device.type != "cpu" and find_kernel_obstacle(device) is None
        results["sums_in_fp32"] = find_fp32_sum_obstacle(device, torch.bfloat16) is None
        print({k: results[k] for k in list(results)[4:]}, flush=True)
        for memory in options.memory:
            run_once(base, memory, options, results)
    finally:
        if not options.keep:
            shutil.rmtree(base, ignore_errors=True)
    return results


def run_once(base: Path, memory: str, options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Quantize within one memory limit."""
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator().manual_seed(1)
    vocabulary = SHAPES[options.shape]["vocab_size"]
    table = torch.randint(0, vocabulary, (options.samples, options.length), generator=generator)
    run_module.Meter = SyncedMeter  # type: ignore[misc]
    run: dict[str, Any] = {"memory": memory, "finished": False, "rates": results["rates"]}
    results["runs"][memory] = run
    output = base / f"out-{memory}"
    timer = BlockTimer(options, run, results)
    try:
        report = halfbyte.quantize(
            base / "model",
            output,
            config=QuantConfig.from_preset(options.preset),
            calibration=CalibrationConfig(samples=options.samples, length=options.length),
            resources=ResourceConfig(
                device=options.device, memory=None if memory == "auto" else memory
            ),
            text=table.tolist(),
            quality=not options.no_quality,
            progress=timer,
        )
        run["finished"] = True
        run["report"] = {
            "seconds": report.seconds,
            "seconds_by_phase": report.seconds_by_phase,
            "checkpoint_bytes": report.checkpoint_bytes,
            "relative_errors": {
                m.name: [m.relative_error, m.round_to_nearest_error, *m.notes]
                for m in report.modules[:14]
            },
            "quality": None if report.quality is None else list_numbers(report.quality),
        }
    except TimeLimitReached:
        print("stopped by --limit-seconds", flush=True)
    except Exception:  # noqa: BLE001 - another memory limit may work
        run["problem"] = traceback.format_exc()
        print(run["problem"], flush=True)
    run["seconds"] = round(timer.elapsed, 3)
    run["seconds_by_phase"] = dict(SyncedMeter.last.seconds)
    summarize(run, options)
    timer.save()
    if not options.keep:
        shutil.rmtree(output, ignore_errors=True)
    print(json.dumps({k: run.get(k) for k in ("summary", "events", "report")}, indent=1))


def list_numbers(quality: Any) -> dict[str, float]:
    """Return the numbers of a quality report."""
    return {"kl_nats": quality.kl_nats_mean, "top1": quality.top1_agreement}


def save_from_file(options: argparse.Namespace) -> None:
    """Save the output of a GPU machine to bench/results/."""
    measured = json.loads(options.keep_from.read_text(encoding="utf-8"))
    rows = []
    for memory, run in measured["runs"].items():
        found = run["summary"]
        phases = [b["phases"] for b in run["blocks"][1:] if "profiled" not in b]
        typical = {
            name: statistics.median(p.get(name, 0.0) for p in phases)
            for name in ("forward and Hessians", "solve")
        }
        rows.append(
            [
                "60% of the GPU's" if memory == "auto" else memory,
                found["seconds_full"],
                "" if found["measured_whole_run"] else f"{found['blocks_done']} blocks, scaled",
                found["floor_seconds_full"],
                round(found["seconds_full"] / found["floor_seconds_full"], 2),
                found["median_block_seconds"],
                *(round(value, 3) for value in typical.values()),
                found["gpu_gb"],
                found["gpu_reserved_gb"],
                found["host_gb"],
            ]
        )
    rates = measured["rates"]
    save_result(
        "gpu-quantize",
        columns=[
            "memory limit", "s in all", "", "floor, s", "over the floor", "s a block",
            "of it forward and Hessians", "of it solving", "GPU GB at most", "in reserve",
            "host GB at most",
        ],
        rows=rows,
        note=(
            "Llama of the 8B shape, 32 blocks, random bf16 weights, `--preset fast`, 128 x 2048 "
            "random tokens; everything of a run from reading the model, which the system's cache "
            "held, to the reload check and the report. Floor: one forward pass through the linears "
            "and half of XᵀX at the rate of this GPU's bf16 products "
            f"({rates['bf16'] / 1e12:.0f} TFLOP/s), factors and sweeps at that of its fp32 ones "
            f"({rates['fp32'] / 1e12:.0f})."
        ),
        data=measured,
        provenance=Provenance(
            date=options.date,
            commit=options.commit,
            command="python bench/measure_gpu_quantize.py",
            machine=measured["machine"],
            versions=measured["versions"],
        ),
    )  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-quantize.json"))
    parser.add_argument(
        "--folder", type=Path, help="for the model and the checkpoint, which are deleted at the end"
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--blocks", type=int, default=FULL_BLOCKS)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="fast")
    parser.add_argument(
        "--memory", nargs="+", default=["auto"], help="memory limits such as 12GB, one run each"
    )
    parser.add_argument(
        "--profile", type=int, help="index of the block to profile (default: the middle; -1: none)"
    )
    parser.add_argument("--limit-seconds", type=float, default=float("inf"))
    parser.add_argument("--no-quality", action="store_true")
    parser.add_argument(
        "--keep", action="store_true", help="do not delete the model and the checkpoint"
    )
    parser.add_argument("--keep-from", type=Path, help="only save this file to bench/results/")
    parser.add_argument("--commit", help="commit that was measured, for --keep-from")
    parser.add_argument("--date", help="date of the measurement, for --keep-from")
    options = parser.parse_args(arguments)
    if options.profile is None:
        options.profile = options.blocks // 2
    return options


def main() -> None:
    """Measure, or save earlier output."""
    options = parse()
    if options.keep_from:
        save_from_file(options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
