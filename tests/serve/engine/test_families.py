"""Models of many families in the engine: they match generate(), or are rejected with a reason."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch
from tests.helpers.families import FAMILIES, VOCABULARY, build_family
from tests.serve.helpers_engine import all_tokens, generate_greedily, mixed_requests

from halfbyte.errors import ModelError
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.serve.engine.loading import make_engine

REFUSED = {
    "falcon": r"its logits deviate from the model's own by 0\.[0-9]+ of their norm",
    "deepseek_v2": "its forward does not support custom attention",
    "deepseek_v3": "its forward does not support custom attention",
    "deepseek_v4": "its forward does not support custom attention",
    "granitemoehybrid": "layer 0 does not cache keys and values per token",
    "openai-gpt": "it has no KV cache",
}
"""Falcon has its own attention. DeepSeek's models cache a latent state and compute keys from all of
it; the last two have layers, or all of them, without keys and values in a cache."""


@pytest.mark.parametrize("family", list(FAMILIES))
def test_six_concurrent_requests_match_generate(family, tmp_path):
    requests = [
        replace(r, prompt=tuple(3 + token % (VOCABULARY - 3) for token in r.prompt))
        for r in mixed_requests(6, seed=4, longest=30)
    ]
    model = build_family(family)
    for parameter in model.parameters():
        # Sharper choices than those of a fresh model: no ties within rounding.
        parameter.data *= 1.5 if parameter.dim() > 1 else 1.0
    expected = [generate_greedily(model, request) for request in requests]
    config = EngineConfig(cache_gb=0.01, max_batched_tokens=24)

    async def run():
        engine = make_engine(model, tmp_path, config)
        found = await all_tokens(engine, requests)
        await engine.close()
        return found

    if family in REFUSED:
        with torch.inference_mode(), pytest.raises(ModelError, match=REFUSED[family]):
            asyncio.run(run())
        return
    assert asyncio.run(run()) == expected
