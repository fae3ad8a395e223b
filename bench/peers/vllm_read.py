"""Read token ids with vLLM on a CPU; in its environment: python vllm_read.py JOB.json.

The job: checkpoint, dtype, windows (lists of token ids) and an output file. It gets what
gptqmodel_run.py writes for windows: negative log-likelihood (nats) and first choice of every token
but the first.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def main(job: dict[str, Any]) -> None:
    """Read the windows."""
    os.environ |= SETTINGS
    from vllm import LLM, SamplingParams, TokensPrompt

    model = LLM(
        job["checkpoint"],
        enforce_eager=True,
        max_model_len=len(job["windows"][0]) + 1,
        dtype=job["dtype"],
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    outputs = model.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in job["windows"]],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False),
    )
    nll, first = [], []
    for ids, output in zip(job["windows"], outputs, strict=True):
        by_token = output.prompt_logprobs[1:]
        nll.append([-seen[i].logprob for i, seen in zip(ids[1:], by_token, strict=True)])
        first.append([max(seen, key=lambda i: seen[i].logprob) for seen in by_token])
    result = {"nll": nll, "first_choice": first}
    Path(job["output"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
