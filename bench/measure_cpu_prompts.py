"""Prompts of several lengths on a CPU: the compiled decoder beside Transformers' own forward.

The two ways run in turn over the same weights and kernels, so that another program's load falls on
both; what is told of each is its median, and its best run for machines that are not quiet.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from halfbyte.integrations.load import load_model
from halfbyte.nn.decoder_parts import get_decoder
from halfbyte.nn.native_decoder import NativeDecoder, find_obstacle
from measure_cpu_models import SHAPE, split_pairs, write_gptq
from record import save_result

LENGTHS = (128, 512, 2048)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="print, do not save")
    arguments = parser.parse_args()
    rows, data = [], {}
    with tempfile.TemporaryDirectory() as made:
        for name, folder in ({SHAPE: write_gptq(Path(made))} | split_pairs(arguments.ours)).items():
            model = load_model(folder, dtype="auto", device="cpu")
            obstacle = find_obstacle(model)
            if obstacle:
                raise SystemExit(f"{name} does not run in the compiled decoder: {obstacle}.")
            for length in arguments.lengths:
                seconds, grown = measure(model, length, arguments.rounds)
                rates = [length / statistics.median(found) for found in seconds.values()]
                best = [length / min(found) for found in seconds.values()]
                rows.append([name, length, *rates, rates[0] / rates[1], *best, grown / 1e6])
                print(*[f"{v:.4g}" if isinstance(v, float) else v for v in rows[-1]], flush=True)
                data[f"{name}, {length} tokens"] = seconds
    if arguments.dry_run:
        return
    save_result(
        "cpu-prompts",
        columns=[
            "model",
            "tokens",
            "compiled decoder, tok/s",
            "Transformers' forward, tok/s",
            "times faster",
            "best of the one",
            "best of the other",
            "MB grown",
        ],
        rows=rows,
        note=f"4 bits, bfloat16, {torch.get_num_threads()} threads; medians of {arguments.rounds} "
        "rounds, in turn, both with the compiled kernel; without the head. Grown: resident memory "
        "by the first prompt of that length in the compiled decoder, its cache included.",
        data=data,
    )


def measure(model: Any, length: int, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of both ways, and bytes that the process grew by at the decoder's first prompt."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompt = [(7919 * (i + 1)) % vocabulary for i in range(length)]
    ids = torch.tensor([prompt])
    process = psutil.Process()
    with torch.inference_mode():
        before = process.memory_info().rss
        decoder = NativeDecoder(model, length)
        decoder.prefill(prompt)
        grown = process.memory_info().rss - before
        ways: dict[str, Callable[[], Any]] = {
            "decoder": lambda: decoder.prefill(prompt),
            "forward": lambda: get_decoder(model)(ids, use_cache=True),
        }
        ways["forward"]()
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, run in ways.items():
                start = time.perf_counter()
                run()
                seconds[way].append(time.perf_counter() - start)
    return seconds, grown


if __name__ == "__main__":
    main()
