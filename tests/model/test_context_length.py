from __future__ import annotations

import pytest
from transformers import BloomConfig, GPT2Config, LlamaConfig, Qwen3Config

from halfbyte.model.context_length import max_context_length

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (LlamaConfig(max_position_embeddings=2048), 2048),
        (GPT2Config(n_positions=64), 64),
        (BloomConfig(), None),
        # As Qwen3's card says to write it: the limit stays that of a model without YaRN.
        (Qwen3Config(max_position_embeddings=40960, rope_scaling=YARN), 131072),
        (Qwen3Config(max_position_embeddings=131072, rope_scaling=YARN), 131072),
        (Qwen3Config(max_position_embeddings=163840, rope_scaling=YARN), 163840),
        (LlamaConfig(max_position_embeddings=2048, rope_scaling=DYNAMIC), 4096),
        # Here the limit is what stretching the positions has reached.
        (LlamaConfig(max_position_embeddings=16384, rope_scaling=LINEAR), 16384),
    ],
)
def test_max_context_length_follows_the_positions(config, longest):
    assert max_context_length(config) == longest
