"""Compare planned with measured memory under a peak load.

    python bench/measure_plan.py MODEL... [--shape-1b] [--requests 4] [--context 1024]

Each model is measured by the function behind ``halfbyte profile``, in a separate process.
``--shape-1b`` adds a random model of the shape of Llama 3.2 1B, written to a temporary folder (2.5
GB).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.judge.profile import profile
from record import save_result

SHAPE_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Profile each model, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--shape-1b", action="store_true")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    rows, data = [], {}
    with tempfile.TemporaryDirectory() as folder:
        models = {path.name: path for path in args.models}
        if args.shape_1b:
            models["random, shape of Llama 3.2 1B"] = write_random(Path(folder))
        for name, path in models.items():
            for dtype in args.dtypes:
                result = profile(path, requests=args.requests, context=args.context, dtype=dtype)
                values = {part: (p, m) for part, p, m in result.parts()}
                row = [name, dtype]
                for part in ("weights", "KV cache", "total"):
                    row += [f"{v / 1e6:,.0f}" for v in values[part]]
                rows.append([*row, round(result.ratio, 3)])
                data[f"{name} {dtype}"] = values
                print(rows[-1], flush=True)
    save_result(
        "plan",
        columns=[
            "model",
            "computed in",
            "weights, planned MB",
            "measured",
            "keys and values, planned MB",
            "measured",
            "together, planned MB",
            "measured",
            "planned / measured",
        ],
        rows=rows,
        note=f"{args.requests} requests of {args.context} tokens, all prompts at once, through "
        "Transformers on a CPU; together: with the program and activations",
        data=data,
    )


def write_random(folder: Path) -> Path:
    """Write the random model."""
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE_1B), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
