"""Measure the time to load a model on a CPU from a warm file cache, in 4 and in 16 bits.

    python bench/measure_loading.py [NAME=BASE,QUANTIZED ...] [--rounds 5]

A 1B shape with random weights is generated in float16 and in 4 bits. Each load runs in its own
process, which imports Transformers and halfbyte before timing starts (but not the modules that they
import while loading); arms run in turn. A dense file is memory-mapped, so its weights are read when
a forward pass first touches them: the time to the first token of a prompt of 16 is reported too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import halfbyte  # noqa: F401 - registers the loader
from halfbyte.integrations.speed import measure_apart
from halfbyte.machine.memory import peak_memory_bytes
from measure_cpu_models import SHAPE, write_gptq
from record import save_result

ARMS = {
    "16 bits, as stored": (0, "auto"),
    "16 bits, into bfloat16": (0, "bfloat16"),
    "16 bits, into float32": (0, "float32"),
    "4 bits": (1, "bfloat16"),
}
PROMPT = 16


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="NAME=BASE,QUANTIZED")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows, data = [], {}
    with tempfile.TemporaryDirectory() as made:
        models = {SHAPE: write_pair(Path(made))}
        for given in arguments.models:
            name, _, folders = given.partition("=")
            base, quantized = folders.split(",")
            models[name] = (Path(base), Path(quantized))
        for name, folders in models.items():
            times: dict[str, list[tuple[float, float, float]]] = {arm: [] for arm in ARMS}
            for _ in range(arguments.rounds):
                for arm, (place, dtype) in ARMS.items():
                    times[arm].append(measure_apart(load_once, folders[place], dtype))
            medians = {
                arm: [statistics.median(column) for column in zip(*found, strict=True)]
                for arm, found in times.items()
            }
            reference = medians["4 bits"]
            for arm, values in medians.items():
                ratios = [values[i] / reference[i] for i in (0, 1)]
                rows.append([name, arm, *values, *ratios])
                print(*rows[-1], flush=True)
            data[name] = times
    save_result(
        "loading",
        columns=[
            *("model", "form", "loaded, s", "first token, s", "memory, GB"),
            *("loaded, times of 4 bits", "first token, times of 4 bits"),
        ],
        rows=rows,
        note=f"{torch.get_num_threads()} threads, warm file cache; from_pretrained alone, and with "
        f"a first token after {PROMPT}; medians of {arguments.rounds} rounds, a process each, arms "
        "in turn, first imports not counted; memory is the process's peak.",
        data=data,
    )


def load_once(folder: Path, dtype: str) -> tuple[float, float, float]:
    """Return the seconds to load and to the first token, and peak memory in GB."""
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    loaded = time.perf_counter() - start
    with torch.inference_mode():
        model(torch.arange(PROMPT)[None]).logits.argmax()
    first = time.perf_counter() - start
    return loaded, first, peak_memory_bytes() / 1e9


def write_pair(folder: Path) -> tuple[Path, Path]:
    """Write the 1B shape in float16 and in 4 bits."""
    quantized, base = folder / "quantized", folder / "base"
    quantized.mkdir()
    write_gptq(quantized)
    settings = json.loads((quantized / "config.json").read_text(encoding="utf-8"))
    del settings["quantization_config"]
    config = LlamaConfig.from_dict(settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.save_pretrained(base)
    return base, quantized


if __name__ == "__main__":
    main()
