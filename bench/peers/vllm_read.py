"""Evaluate token ids with vLLM on a CPU. Run in its environment: python vllm_read.py JOB.json.

Fields of the job: windows (lists of token ids of equal length) and runs, each with a checkpoint, a
dtype, an output file and optionally the folder of a PEFT adapter. With an adapter, the output has
the greedy replies to the windows, because vLLM's CPU build does not return logprobs of a prompt
with one; without, it has the negative log-likelihood (nats) and the top-1 prediction of every token
but the first. If vLLM refuses the checkpoint, its error message is written to the output file's
name plus .refused.
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

NEW_TOKENS = 24
"""Tokens of a greedy reply."""


def main(job: dict[str, Any]) -> None:
    """Evaluate the windows, once per run."""
    os.environ |= SETTINGS
    from vllm.distributed import cleanup_dist_env_and_memory

    for run in job["runs"]:
        try:
            result = read(run["checkpoint"], run["dtype"], job["windows"], run.get("adapter"))
        # vLLM raises some refusals as assertions.
        except (ValueError, RuntimeError, AssertionError, KeyError) as error:
            message = f"{type(error).__name__}: {error}"
            Path(run["output"] + ".refused").write_text(message, encoding="utf-8")
        else:
            Path(run["output"]).write_text(json.dumps(result), encoding="utf-8")
        cleanup_dist_env_and_memory()


def read(
    checkpoint: str, dtype: str, windows: list[list[int]], adapter: str | None
) -> dict[str, Any]:
    """Load a checkpoint; rate the windows, or reply to them with the adapter."""
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    rates = adapter is None
    new_tokens = 1 if rates else NEW_TOKENS
    model = LLM(
        checkpoint,
        enforce_eager=True,
        max_model_len=len(windows[0]) + new_tokens,
        dtype=dtype,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        enable_lora=not rates,
    )
    outputs = model.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in windows],
        SamplingParams(
            max_tokens=new_tokens,
            min_tokens=new_tokens,
            temperature=0,
            prompt_logprobs=1 if rates else None,
            detokenize=False,
        ),
        lora_request=None if rates else LoRARequest("adapter", 1, adapter),
    )
    if not rates:
        return {"replies": [list(output.outputs[0].token_ids) for output in outputs]}
    nll, first = [], []
    for ids, output in zip(windows, outputs, strict=True):
        by_token = output.prompt_logprobs[1:]
        nll.append([-seen[i].logprob for i, seen in zip(ids[1:], by_token, strict=True)])
        first.append([max(seen, key=lambda i: seen[i].logprob) for seen in by_token])
    return {"nll": nll, "first_choice": first}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
