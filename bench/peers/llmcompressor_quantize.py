"""Quantize with llm-compressor. Run in its environment: python llmcompressor_quantize.py JOB.json.

Fields of the job: model (folder), ids (lists of token ids of equal length), output (folder),
group_size, and batch_size. Computes in bf16, because its default of fp16 takes minutes per layer on
a CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Quantize the model."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": job["group_size"],
    }
    groups = {"all": {"targets": ["Linear"], "weights": weights}}
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    oneshot(
        model=model,
        dataset=Dataset.from_dict(
            {"input_ids": job["ids"], "attention_mask": [[1] * len(row) for row in job["ids"]]}
        ),
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
        max_seq_length=len(job["ids"][0]),
        num_calibration_samples=len(job["ids"]),
        batch_size=job["batch_size"],
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(job["output"], save_compressed=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
