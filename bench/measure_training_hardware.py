"""Plan which GPU is large enough to train which model; nothing is run.

python bench/measure_training_hardware.py
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from halfbyte.plan.devices import SIZES, parse_device
from halfbyte.plan.memory import Load
from halfbyte.plan.shapes import read_shapes
from halfbyte.plan.training import TrainingLoad, plan_training
from record import save_result

MODELS = ("7B", "8B", "13B", "30B", "65B", "70B")
TOKENS = (512, 2048)
BITS = (4, 16)


def main() -> None:
    """Plan each model, print and save."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    for model in MODELS:
        shapes, row = read_shapes(model), [model]
        for bits in BITS:
            for tokens in TOKENS:
                load = TrainingLoad(base=Load(bits=bits, context=tokens))
                plan = plan_training(shapes, load)
                fits = [size for size in SIZES if plan.total <= parse_device(f"{size}GB").bytes]
                row += [f"{plan.total / 1e9:.1f}", f"{fits[0]} GB" if fits else "none"]
        small = plan_training(
            shapes,
            replace(TrainingLoad(base=Load(context=512)), targets=("q_proj", "v_proj")),
        )
        row += [f"{2 * small.trained / 1e6:.0f}"]
        rows.append(row)
        print(row)
    columns = ["model"]
    for bits in BITS:
        columns += [
            name
            for tokens in TOKENS
            for name in (f"{bits} bits, {tokens} tokens, GB", "smallest card")
        ]
    save_result(
        "training-hardware",
        columns=[*columns, "adapter on q and v in 16 bits, MB"],
        rows=rows,
        note="one row at a time, rank 16 on every linear, AdamW in fp32, activations computed "
        "again; 0.7 GB for the device's own, 92% of a card usable; arithmetic, nothing was run",
        data={},
    )


if __name__ == "__main__":
    main()
