"""Recompute the memory table of the article behind this project with `halfbyte plan`.

    python bench/measure_article_memory.py

No model is needed. The article lists weights only, in round numbers. The table adds the size of a
real checkpoint (groups of 128, embeddings and output layer in 16 bits) and the memory of one and of
sixteen requests of 4,096 tokens.
"""

from __future__ import annotations

import argparse

from halfbyte.plan.devices import GIB, SIZES
from halfbyte.plan.memory import GPU_PROGRAM_BYTES, Load, plan_memory
from halfbyte.plan.shapes import read_shapes
from record import save_result

ARTICLE_GB = {
    ("7B", 16): "14",
    ("7B", 8): "7",
    ("7B", 4): "4",
    ("13B", 16): "–",
    ("13B", 8): "–",
    ("13B", 4): "–",
    ("70B", 16): "140",
    ("70B", 8): "70",
    ("70B", 4): "35",
}


def main() -> None:
    """Compute the table, print and save it."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows, data = [], {}
    for (name, bits), article in ARTICLE_GB.items():
        shapes = read_shapes(name)
        one = plan_memory(shapes, Load(bits=bits, context=4096, requests=1))
        many = plan_memory(shapes, Load(bits=bits, context=4096, requests=16))
        card = next((f"{s} GB" for s in SIZES if one.total <= s * GIB * 0.92), "several")
        rows.append(
            [
                name,
                "fp16" if bits == 16 else f"{bits} bits",
                article,
                f"{one.weights / 1e9:.1f}",
                f"{one.total / 1e9:.1f}",
                f"{many.cache / 1e9:.1f}",
                f"{many.total / 1e9:.1f}",
                card,
            ]
        )
        data[f"{name} {bits}"] = {"one": one.to_dict(), "sixteen": many.to_dict()}
        print(rows[-1])
    save_result(
        "article-memory",
        columns=[
            "model",
            "weights in",
            "article, GB",
            "weights, GB",
            "with one request, GB",
            "cache of 16 requests, GB",
            "with 16 requests, GB",
            "smallest card for one",
        ],
        rows=rows,
        note="Llama 2 shapes, groups of 128, embeddings and output layer in 16 bits, requests of "
        f"4,096 tokens, cache in fp16; {GPU_PROGRAM_BYTES / 1e9:.1f} GB for the device's own; "
        "arithmetic, nothing was run",
        data=data,
    )


if __name__ == "__main__":
    main()
