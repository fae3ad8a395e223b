"""Measure GPTQModel's speed on a CPU. Run in its environment: python gptqmodel_speed.py JOB.json.

Fields of the job: checkpoint, backend, dtype, prompt (tokens), new (tokens), repeats, output. The
output has the class of the first linear, and prompt and generated tokens per second of each repeat
(without a first one for warm-up), or the error message with which the backend refuses to load.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Measure and write the output."""
    # GPTQModel refuses to load a model with fewer, whatever the number of cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel

    settings = {"backend": BACKEND[job["backend"]], "device": "cpu"}
    try:
        loaded = GPTQModel.load(job["checkpoint"], **settings, dtype=dtype_of(job))
    except ValueError as error:  # raised for unsupported checkpoints; other errors end this process
        result: dict[str, Any] = {"refused": str(error)}
    else:
        result = measure(loaded.model.eval(), job)
    Path(job["output"]).write_text(json.dumps(result), encoding="utf-8")


def dtype_of(job: dict[str, Any]) -> Any:
    """Return torch's dtype of the job."""
    import torch

    return getattr(torch, job["dtype"])


def measure(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Time generation, several times."""
    import torch
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    kernel = next(m for m in model.modules() if isinstance(m, BaseQuantLinear))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompts, rates = [], []
    for repeat in range(job["repeats"] + 1):
        ids = [[(7919 * (i + 1) + repeat) % vocabulary for i in range(job["prompt"])]]
        prompt, rate = generate(model, torch.tensor(ids), job["new"])
        prompts.append(prompt)
        rates.append(rate)
    return {"kernel": type(kernel).__name__, "prompt": prompts[1:], "rate": rates[1:]}


def generate(model: Any, ids: Any, new: int) -> tuple[float, float]:
    """Return the prompt tokens per second, and the tokens per second after the first."""
    import torch

    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    seconds = {}
    with torch.inference_mode():
        for count in (1, new):
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=count, min_new_tokens=count, **settings)
            seconds[count] = time.perf_counter() - start
    return ids.shape[1] / seconds[1], (new - 1) / (seconds[new] - seconds[1])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
