"""Read token ids with vLLM on a CPU; in its environment: python vllm_read.py JOB.json.

The job: windows (equally long lists of token ids) and runs, each a checkpoint, a dtype and an
output file. Each file gets the negative log-likelihood (nats) and the first choice of every token
but the first; where vLLM refuses the checkpoint, its words go into a file of that name with
.refused behind it.
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
    """Read the windows once per run."""
    os.environ |= SETTINGS
    from vllm.distributed import cleanup_dist_env_and_memory

    for run in job["runs"]:
        try:
            result = read(run["checkpoint"], run["dtype"], job["windows"])
        # Some of its refusals are assertions.
        except (ValueError, RuntimeError, AssertionError, KeyError) as error:
            words = f"{type(error).__name__}: {error}"
            Path(run["output"] + ".refused").write_text(words, encoding="utf-8")
        else:
            Path(run["output"]).write_text(json.dumps(result), encoding="utf-8")
        cleanup_dist_env_and_memory()


def read(checkpoint: str, dtype: str, windows: list[list[int]]) -> dict[str, Any]:
    """Load a checkpoint and read the windows."""
    from vllm import LLM, SamplingParams, TokensPrompt

    model = LLM(
        checkpoint,
        enforce_eager=True,
        max_model_len=len(windows[0]) + 1,
        dtype=dtype,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    outputs = model.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in windows],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False),
    )
    nll, first = [], []
    for ids, output in zip(windows, outputs, strict=True):
        by_token = output.prompt_logprobs[1:]
        nll.append([-seen[i].logprob for i, seen in zip(ids[1:], by_token, strict=True)])
        first.append([max(seen, key=lambda i: seen[i].logprob) for seen in by_token])
    return {"nll": nll, "first_choice": first}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
