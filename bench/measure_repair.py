"""Measure the gain of adapters of ``halfbyte repair`` on held-out text.

    python bench/measure_repair.py QUANTIZED ORIGINAL [--ranks 16 64] [--samples 32]

KL to the original and perplexity on held-out windows, without an adapter and with one of each rank.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from peft import PeftModel

from halfbyte.evaluate.divergence import divergence
from halfbyte.evaluate.loading import load_tokenizer, open_subject
from halfbyte.finetune.repair import repair
from halfbyte.quant_config import CalibrationConfig
from record import save_result


def main() -> None:
    """Repair with each rank, and compare the results with the original."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("quantized", type=Path)
    parser.add_argument("original", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.original)
    original = open_subject(args.original, dtype="bfloat16", device="cpu").model

    def measure(model: object) -> dict[str, object]:
        result = divergence(
            original, model, tokenizer=tokenizer, window=512, windows=args.windows
        ).to_dict()
        print(result, flush=True)
        return result

    found = {"none": measure(open_subject(args.quantized, dtype="bfloat16", device="cpu").model)}
    left: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rank in args.ranks:
            target = Path(folder) / str(rank)
            report = repair(
                args.quantized,
                args.original,
                target,
                rank=rank,
                calibration=CalibrationConfig(samples=args.samples, length=512),
            )
            left[str(rank)] = report.mean_kept_error
            base = open_subject(args.quantized, dtype="bfloat16", device="cpu").model
            found[str(rank)] = measure(PeftModel.from_pretrained(base, target))
    rows = [
        [name, f"{left.get(name, 1.0):.0%}", f["kl_nats"], f["quantized"]["perplexity"]]
        for name, f in found.items()
    ]
    save_result(
        "repair",
        columns=["rank", "squared output error left", "KL to the original", "perplexity"],
        rows=rows,
        note=f"{args.windows} held-out windows of 512 tokens; built-in text, {args.samples} x 512.",
        data={"divergence": found, "kept": left},
    )


if __name__ == "__main__":
    main()
