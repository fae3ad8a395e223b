"""Run a checkpoint in GPTQModel. Run in its environment: python gptqmodel_run.py JOB.json.

Fields of the job: checkpoint, prompts (lists of token ids), new_tokens, windows (lists of token ids
of equal length), and runs, each with a backend, the dtype to load in, whether to convert to float32
after loading, and an output file. The output has the class of the first linear, the greedy answers,
and on the windows the negative log-likelihood (nats) and the top-1 prediction of every token but
the first.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Answer the prompts and evaluate the windows, once per run."""
    # GPTQModel refuses to load a model with fewer, whatever the number of cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    # Compiling takes minutes and does not change results.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    windows = torch.tensor(job["windows"])
    for run in job["runs"]:
        backend, dtype = BACKEND[run["backend"]], getattr(torch, run["dtype"])
        loaded = GPTQModel.load(job["checkpoint"], backend=backend, device="cpu", dtype=dtype)
        model = (loaded.model.float() if run["to_float32"] else loaded.model).eval()
        kernel = next(m for m in model.modules() if isinstance(m, BaseQuantLinear))
        with torch.no_grad():
            answers = [answer(model, prompt, job["new_tokens"]) for prompt in job["prompts"]]
            logits = torch.cat([model(ids[None]).logits.float() for ids in windows])[:, :-1]
        nll = -logits.log_softmax(-1).gather(-1, windows[:, 1:, None])[..., 0]
        result = {
            "kernel": type(kernel).__name__,
            "answers": answers,
            "nll": nll.tolist(),
            "first_choice": logits.argmax(-1).tolist(),
        }
        Path(run["output"]).write_text(json.dumps(result), encoding="utf-8")


def answer(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """Continue a prompt greedily."""
    import torch

    ids = torch.tensor([prompt])
    whole = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
    )
    return whole[0, len(prompt) :].tolist()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
