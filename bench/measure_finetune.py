"""Compare adapters trained on a 4-bit and on a 16-bit base, with the same number of steps.

    python bench/measure_finetune.py 4-bit=QUANTIZED 16-bit=BASE --work DIR

Trains one adapter per base with the same data, order and settings, and counts exact answers to
held-out items of bench/extraction_task.py. A second call with the same DIR resumes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from extraction_task import measure_accuracy, split_items, write_items
from halfbyte.cli.output import err_console
from halfbyte.finetune.config import AdapterConfig, TrainConfig
from halfbyte.finetune.progress import make_train_progress
from halfbyte.finetune.train import finetune
from record import save_result

TRAINING, HELD_OUT = 800, 100


def main() -> None:
    """Train and evaluate each adapter, save the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bases", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=64)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    training, held_out = split_items(TRAINING, HELD_OUT)
    data = args.work / "train.jsonl"
    write_items(training, data)
    rows, found = [], {}
    for name, folder in (base.split("=", 1) for base in args.bases):
        report = finetune(
            folder,
            args.work / name,
            data=data,
            adapter=AdapterConfig(rank=16, alpha=32.0, dropout=0.0),
            config=TrainConfig(
                epochs=10,
                max_steps=args.steps,
                batch_size=8,
                learning_rate=1.5e-3,
                validation=0.04,
                evaluate_every=max(args.steps // 2, 1),
                checkpointing=False,
            ),
            resume=(args.work / name).is_dir(),
            progress=make_train_progress(err_console),
        )
        answers = args.work / f"{name}.accuracy.json"
        if not answers.exists():
            answers.write_text(json.dumps(_evaluate(folder, args.work / name, held_out)))
        before, after = json.loads(answers.read_text())
        rows.append([name, f"{before:.0%}", f"{after:.0%}", f"{report.seconds / 60:.1f}"])
        report_data = report.to_dict()
        # Results must not contain folders of this machine.
        for key in ("model", "output"):
            report_data[key] = Path(report_data[key]).name
        report_data["data"]["file"] = data.name
        found[name] = {"before": before, "after": after, "report": report_data}
        print(rows[-1], flush=True)
    save_result(
        "finetune",
        columns=["base", "right before", "right after", "minutes of training"],
        rows=rows,
        note=(
            f"SmolLM2-135M, rank 16 on every linear, {args.steps} steps of 8 examples, "
            f"{HELD_OUT} held-out items, right letter for letter."
        ),
        data=found,
    )


def _evaluate(folder: str, adapter: Path, held_out: list) -> tuple[float, float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = measure_accuracy(model, tokenizer, held_out)
    adapted = PeftModel.from_pretrained(model, adapter)
    return before, measure_accuracy(adapted, tokenizer, held_out)


if __name__ == "__main__":
    main()
