"""Measure quantizing and generating beside busy processes, for ways in which threads wait.

    python bench/measure_busy_machine.py QUANTIZED [--busy 0 2] [--rounds 3]

The environment says how long threads spin before they sleep; OpenMP reads it once, so each run has
a process of its own. Arms run in turn. A busy process computes without end and takes one core, if
it gets it: beside as many of them as there are cores, the fair share is half of the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.integrations.load import load_model
from halfbyte.integrations.speed import measure_apart, measure_speed
from halfbyte.machine.threads import SPIN_ROUNDS
from halfbyte.quant_config import CalibrationConfig, QuantConfig
from halfbyte.quantize.pipeline import quantize
from record import save_result

ARMS = {
    "spinning, OpenMP's default": {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": None},
    "halfbyte's command": {"GOMP_SPINCOUNT": str(SPIN_ROUNDS)},
    "not spinning": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SAMPLES, LENGTH, BLOCKS = 12, 512, 4
NEW_TOKENS = 32


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="quantized model that generates")
    parser.add_argument("--busy", type=int, nargs="*", default=[0, os.cpu_count() or 1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="print without saving")
    arguments = parser.parse_args()
    rows, data = [], {}
    with tempfile.TemporaryDirectory() as made:
        base = write_model(Path(made) / "base")
        measure_apart(quantize_once, base)  # reads everything once
        for count in arguments.busy:
            found: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
            with busy_processes(count):
                for _ in range(arguments.rounds):
                    for arm, settings in ARMS.items():
                        with environment(settings):
                            seconds = measure_apart(quantize_once, base)
                            rate = measure_apart(generate_once, arguments.model)
                        found[arm].append((seconds, rate))
                        print(count, arm, f"{seconds:.4g} s, {rate:.4g} tok/s", flush=True)
            for arm, pairs in found.items():
                medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
                rows.append([count, arm, *medians])
            data[f"{count} busy"] = found
    if arguments.dry_run:
        return
    save_result(
        "busy-machine",
        columns=["busy processes", "threads wait", "quantized in, s", "generated tok/s"],
        rows=rows,
        note=f"{BLOCKS} blocks of SmolLM2's shape, random weights, {SAMPLES} x {LENGTH} tokens; "
        f"generated: {arguments.model.name}, {NEW_TOKENS} tokens; {torch.get_num_threads()} "
        f"threads unless said otherwise; medians of {arguments.rounds} rounds, arms in turn.",
        data=data,
    )


def write_model(folder: Path) -> Path:
    """Write a model of random weights."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=BLOCKS,
        vocab_size=1024,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def quantize_once(base: Path) -> float:
    """Quantize the model; return the seconds."""
    tokens = torch.randint(0, 1024, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    calibration = CalibrationConfig(samples=SAMPLES, length=LENGTH)
    with tempfile.TemporaryDirectory() as made:
        start = time.perf_counter()
        quantize(
            base,
            Path(made) / "out",
            config=QuantConfig.from_preset("fast"),
            calibration=calibration,
            text=tokens.tolist(),
        )
        return time.perf_counter() - start


def generate_once(folder: Path) -> float:
    """Return the tokens that the model generates per second."""
    result = measure_speed(
        lambda: load_model(folder, dtype="auto", device="cpu"),
        prompt_tokens=64,
        new_tokens=NEW_TOKENS,
        repeats=3,
    )
    return result.rate


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run processes that compute without end."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@contextmanager
def environment(settings: dict[str, str | None]) -> Iterator[None]:
    """Set variables for the processes that start meanwhile; None: unset."""
    before = {name: os.environ.get(name) for name in settings}
    _set(settings)
    try:
        yield
    finally:
        _set(before)


def _set(settings: dict[str, str | None]) -> None:
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


if __name__ == "__main__":
    main()
