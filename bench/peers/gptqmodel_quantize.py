"""Quantize with GPTQModel. Run in its environment: python gptqmodel_quantize.py JOB.json.

Fields of the job: model (folder), ids (lists of token ids), runs (each with an output folder and
the settings of QuantizeConfig), and optionally batch_size.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Quantize the model once per run."""
    # GPTQModel refuses to load a model with fewer, whatever the number of cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    samples = [torch.tensor([row]) for row in job["ids"]]
    calibration = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in samples]
    for run in job["runs"]:
        model = GPTQModel.load(job["model"], QuantizeConfig(**run["settings"]), device="cpu")
        model.quantize(calibration, batch_size=job.get("batch_size", 1))
        model.save(run["output"])


# GPTQModel's worker threads import this file again.
if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
