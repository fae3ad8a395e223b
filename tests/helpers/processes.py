"""Processes to be killed, each forked from one that has imported everything already.

Importing Transformers and all that a run needs takes seconds of a processor; killing a run at
random and going on takes half a dozen processes a test.
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
