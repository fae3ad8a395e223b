"""Measure task accuracy after each way of merging an adapter into its base.

    python bench/measure_merge.py BASE --work DIR [--alone] [--exact]

DIR is that of ``bench/measure_finetune.py``, with the adapter for BASE in ``4-bit``. All models
answer the same held-out items of bench/extraction_task.py; only exact answers count. Requantized
models are compared with the 16-bit merge by ``halfbyte compare``. ``--alone`` also quantizes
without matching the unrounded model; ``--exact`` also trains an adapter of --variant qalora with
the same number of steps and merges it exactly. A second call with the same DIR resumes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from extraction_task import Item, measure_accuracy, split_items
from halfbyte.cli.output import err_console
from halfbyte.finetune.config import AdapterConfig, TrainConfig
from halfbyte.finetune.exact_merge import merge_exactly
from halfbyte.finetune.merge import merge
from halfbyte.finetune.progress import make_train_progress
from halfbyte.finetune.requantize import merge_and_quantize, merging_config
from halfbyte.finetune.train import finetune
from halfbyte.judge.compare import compare
from halfbyte.judge.setup import CompareConfig
from halfbyte.judge.tasks import read_tasks
from halfbyte.quantize.progress import make_progress
from halfbyte.quantize.report import load_report
from record import save_result

TRAINING, HELD_OUT = 800, 300
"""With 300 correct answers and none lost, ``compare`` can exclude a loss of 2 points."""


def main() -> None:
    """Merge in every way, evaluate, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, metavar="BASE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--alone", action="store_true", help="also quantize without --match-base")
    parser.add_argument("--exact", action="store_true", help="also train and merge exactly")
    args = parser.parse_args()
    _, held_out = split_items(TRAINING, HELD_OUT)
    work, base, adapter = args.work, args.base, args.work / "4-bit"
    data = work / "train.jsonl"
    answers = Answers(work, held_out)
    rows, found = [], {}

    def add(name: str, key: str, folder: Path, adapter: Path | None = None, **more: Any) -> None:
        right = answers.measure_accuracy(key, folder, adapter)
        found[key] = {"right": right, **more}
        rows.append([name, f"{right:.1%}", more.get("verdict", "")])
        print(rows[-1], flush=True)

    dense = work / "merged-16-bit"
    if not dense.exists():
        merge(base, adapter, dense, data=data)
    add("base plus adapter", "adapted", base, adapter)
    add("merged, 16 bits", "dense", dense)
    variants: dict[str, tuple[str, dict[str, Any]]] = {
        "quantized": ("quantized again (`--quantize`)", {})
    }
    if args.alone:
        variants["alone"] = ("the same with `--no-match-base`", {"match_base": False})
    for key, (name, settings) in variants.items():
        folder = work / f"merged-{key}"
        more = _requantize(base, adapter, folder, data, settings)
        add(name, key, folder, **more, verdict=answers.compare(key, dense, folder))
    if args.exact:
        _exact(base, work, data, add)
    save_result(
        "merge",
        columns=["model", "right", "`halfbyte compare` with the 16-bit merge"],
        rows=rows,
        note=(
            f"SmolLM2-135M, 4 bits, the adapter of `bench/measure_finetune.py`; {HELD_OUT} "
            "held-out items, right letter for letter, 2 points may be lost."
        ),
        data=found,
    )


def _requantize(
    base: Path, adapter: Path, folder: Path, data: Path, settings: dict[str, Any]
) -> dict[str, Any]:
    """Merge and quantize, unless done before; return scores, minutes and quality."""
    report_file = folder.with_name(f"{folder.name}.json")
    if not report_file.exists():
        report = merge_and_quantize(
            base,
            adapter,
            folder,
            data=data,
            config=merging_config(base, **settings),
            progress=make_progress(err_console),
        )
        report_file.write_text(json.dumps(report.to_dict()))
    quantized, merged = load_report(folder), json.loads(report_file.read_text())
    return {
        "scores": merged["scores"],
        "minutes": quantized.seconds / 60,
        "quality": None if quantized.quality is None else quantized.quality.kl_nats_mean,
    }


def _exact(base: Path, work: Path, data: Path, add: Any) -> None:
    """Train an adapter that is constant over groups, and merge it."""
    adapter, merged = work / "qalora", work / "merged-exact"
    finetune(
        base,
        adapter,
        data=data,
        adapter=AdapterConfig(rank=16, alpha=32.0, dropout=0.0, variant="qalora"),
        config=TrainConfig(
            epochs=10,
            max_steps=64,
            batch_size=8,
            learning_rate=1.5e-3,
            validation=0.04,
            evaluate_every=32,
            checkpointing=False,
        ),
        resume=adapter.is_dir(),
        progress=make_train_progress(err_console),
    )
    add("base plus adapter constant over groups", "qalora", base, adapter)
    report_file = work / "merged-exact.json"
    if not report_file.exists():
        report_file.write_text(json.dumps(merge_exactly(base, adapter, merged).to_dict()))
    report = json.loads(report_file.read_text())
    add("that, merged exactly (`--exact`)", "exact", merged, kl=report["kl_to_adapted"])


class Answers:
    """Models' answers, cached in the work folder."""

    def __init__(self, work: Path, items: list[Item]) -> None:
        """Write the items in the format of ``halfbyte compare``."""
        self.work, self.items = work, items
        self.tasks = work / "held-out.jsonl"
        lines = [{"prompt": item.prompt, "answer": item.record.strip()} for item in items]
        self.tasks.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def measure_accuracy(self, key: str, folder: Path, adapter: Path | None) -> float:
        """Return the share of items that a model answers exactly."""
        cached = self.work / f"right-{key}.json"
        if not cached.exists():
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            if adapter is not None:
                model = PeftModel.from_pretrained(model, adapter)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            cached.write_text(json.dumps(measure_accuracy(model, tokenizer, self.items)))
        return float(json.loads(cached.read_text()))

    def compare(self, key: str, dense: Path, folder: Path) -> str:
        """Return the verdict of ``halfbyte compare`` on replacing the 16-bit merge."""
        cached = self.work / f"verdict-{key}.json"
        if not cached.exists():
            comparison = compare(
                dense,
                folder,
                items=read_tasks([self.tasks]),
                documents={},
                config=CompareConfig(edge_cases=False, dtype="bfloat16", batch_size=50),
                cache=self.work / "compare",
            )
            cached.write_text(json.dumps(comparison.to_dict(), default=str))
        return str(json.loads(cached.read_text())["outcome"])


if __name__ == "__main__":
    main()
