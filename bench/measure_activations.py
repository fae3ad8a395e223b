"""Measure int8 activations on a CPU: speedup by instruction set, and loss of quality.

    python bench/measure_activations.py MODEL [--rounds 7] [--windows 8]

Layers are those of measure_cpu_layers.py, with cold weights; both kinds run in turn. The loss is
the divergence of a quantized model from itself with float activations, on the shipped texts.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import halfbyte
from halfbyte.data import EVALUATION_FILES, evaluation_documents
from halfbyte.integrations.activations import measure_rounding
from halfbyte.kernels.cpu_int8 import CpuInt8
from halfbyte.kernels.cpu_native import CpuNative
from halfbyte.kernels.native_library import open_library
from measure_cpu_layers import SHAPES, ColdLayer
from record import save_result

LAYERS = ("1B attention", "1B gate/up", "1B down")
ROWS = (1, 4, 8)
WINDOW = 512


def main() -> None:
    """Measure both, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--windows", type=int, default=8, help="windows of each kind of text")
    arguments = parser.parse_args()
    measure_cost(arguments)
    measure_layers(arguments.rounds)


def measure_layers(rounds: int) -> None:
    """Time single layers on every instruction set."""
    functions = open_library().functions
    assert functions is not None
    rows, data = [], {}
    layers = {name: ColdLayer(*SHAPES[name], torch.bfloat16) for name in LAYERS}
    for isa in functions.hb_isas().decode().split(","):
        if isa == "serial":
            continue
        functions.hb_select_isa(isa.encode())
        for name, layer in layers.items():
            for count in ROWS:
                x = torch.randn(count, layer.spec.in_features).bfloat16()
                kernels = {"float": CpuNative(), "int8": CpuInt8()}
                times: dict[str, list[float]] = {kind: [] for kind in kernels}
                calls = max(int(1e8 / layer.packed_bytes / max(count / 4, 1)), 2)
                for _ in range(rounds):
                    for kind, kernel in kernels.items():
                        layer.kernel = kernel
                        times[kind].append(
                            layer.time(
                                lambda layer=layer, x=x: layer.kernel.apply(
                                    x, layer.next_packed(), None, layer.spec
                                ),
                                calls,
                            )
                        )
                exact, rounded = (statistics.median(found) for found in times.values())
                rows.append([isa, name, count, exact * 1e6, rounded * 1e6, exact / rounded])
                data[f"{isa}, {name}, {count} rows"] = times
                print(*rows[-1], flush=True)
    functions.hb_select_isa(None)
    save_result(
        "activations-speed",
        columns=["instructions", "layer", "rows", "float, µs", "int8, µs", "times faster"],
        rows=rows,
        note=f"4 bits, group 128, symmetric, bfloat16, {torch.get_num_threads()} threads; medians "
        f"of {rounds} rounds, in turn; weights cold; lower instruction sets chosen by hand on the "
        "same processor.",
        data=data,
    )


def measure_cost(arguments: Any) -> None:
    """Measure the divergence on every kind of text."""
    model = halfbyte.load(arguments.model, dtype=torch.float32, activations="int8")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows, data = [], {}
    for kind in EVALUATION_FILES:
        text = "\n\n".join(evaluation_documents(kind))
        result = measure_rounding(model, tokenizer, text, window=WINDOW, windows=arguments.windows)
        rows.append(
            [
                kind,
                result.kl_nats,
                result.kl_standard_error or 0.0,
                result.top1_agreement,
                result.base.perplexity,
                result.quantized.perplexity,
            ]
        )
        data[kind] = result.to_dict()
        print(*rows[-1], flush=True)
    save_result(
        "activations",
        columns=["text", "KL, nats", "±", "same first choice", "perplexity, float", "int8"],
        rows=rows,
        note=f"a quantized model in float32 beside itself with activations in int8; "
        f"{arguments.windows} windows of {WINDOW} tokens of each shipped text.",
        data=data,
    )


if __name__ == "__main__":
    main()
