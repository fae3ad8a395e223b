"""A multiprocessing context for tests that kill processes: all imports are preloaded.

Importing everything that a run needs takes seconds of CPU time, and a test that kills and resumes
runs starts about six processes.
"""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "halfbyte.finetune.train",
        "halfbyte.quantize.pipeline",
        "halfbyte.quantize.student",
        "matplotlib.pyplot",
        "peft",
        "tests.helpers.families",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
        "transformers.trainer",
    ]
)
