"""Quantize with AutoRound. Run in its environment: python autoround_quantize.py JOB.json.

Fields of the job: model (folder), ids (lists of token ids of equal length), batch_size, iterations,
device, and runs, each with output (folder) and settings (bits, group_size). Computes in bf16,
symmetric.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Quantize the model, once per run."""
    import torch
    from auto_round import AutoRound
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows = [{"input_ids": torch.tensor(ids)} for ids in job["ids"]]
    for run in job["runs"]:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
        tool = AutoRound(
            model,
            tokenizer,
            **run["settings"],
            sym=True,
            iters=job["iterations"],
            nsamples=len(rows),
            seqlen=len(job["ids"][0]),
            batch_size=job["batch_size"],
            # With a different batch size here, AutoRound reports that the model is not supported.
            dataset=DataLoader(rows, batch_size=job["batch_size"]),
            device_map=job["device"],
        )
        output = Path(run["output"])
        tool.quantize_and_save(str(output), format="auto_gptq")
        if not (output / "config.json").is_file():
            # AutoRound writes to a subfolder of the given folder.
            (inner,) = output.iterdir()
            for path in inner.iterdir():
                shutil.move(path, output / path.name)
            inner.rmdir()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
