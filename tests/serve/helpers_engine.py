"""Engines of tiny models and requests to them, for tests without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tests.helpers.checkpoints import Recipe, tiny_llama_config, write_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import halfbyte
from halfbyte.kernels.native_library import open_library
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.serve.engine.contract import Ended, Generated, Prefilled, TokenRequest
from halfbyte.serve.engine.engine import EmbeddedEngine
from halfbyte.serve.engine.loading import make_engine

POSITIONS = 256
VOCABULARY = 384
"""Three special tokens, 256 bytes, and some unused ids."""


def write_model(folder: Path, *, positions: int = POSITIONS) -> Path:
    """Write a Llama with random codes and a byte tokenizer."""
    config = tiny_llama_config(max_position_embeddings=positions, vocab_size=VOCABULARY)
    write_checkpoint(folder, config, Recipe())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: 3 + i for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    return folder


def load_float32(folder: Path) -> Any:
    return halfbyte.load(folder, dtype=torch.float32)


def runners() -> tuple[str, ...]:
    """The runners that this installation has."""
    return ("transformers",) if open_library().functions is None else ("transformers", "native")


@asynccontextmanager
async def open_tiny(folder: Path, runner: str = "transformers", **settings: Any):
    """An engine of a tiny model; closed at the end."""
    # Every token is delivered at once: tests check the order.
    settings = {"cache_gb": 0.002, "runner": runner, "piece_seconds": 0.0, **settings}
    engine = make_engine(load_float32(folder), folder, EngineConfig(**settings))
    try:
        yield engine
    finally:
        await engine.close()


def ask(prompt: Sequence[int], max_new_tokens: int = 8, **settings: Any) -> TokenRequest:
    """A greedy request that ignores the end-of-text token."""
    values = {"temperature": 0.0, "ignore_end": True, **settings}
    return TokenRequest(prompt=tuple(prompt), max_new_tokens=max_new_tokens, **values)


async def collect(engine: EmbeddedEngine, request: TokenRequest) -> list[Any]:
    return [event async for events in engine.generate(request) for event in events]


async def tokens_of(engine: EmbeddedEngine, request: TokenRequest) -> list[int]:
    """The tokens of an answer; checks the order of its events."""
    events = await collect(engine, request)
    assert isinstance(events[0], Prefilled)
    assert isinstance(events[-1], Ended)
    assert all(isinstance(event, Generated) for event in events[1:-1])
    return [event.scored.token for event in events[1:-1]]


async def all_tokens(engine: EmbeddedEngine, requests: Sequence[TokenRequest]) -> list[list[int]]:
    return list(await asyncio.gather(*(tokens_of(engine, request) for request in requests)))


def mixed_requests(count: int, *, seed: int = 0, longest: int = 40, **settings: Any):
    """Prompts and answers of mixed lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(1, most + 1, (1,), generator=generator))

    requests = []
    for _ in range(count):
        prompt = torch.randint(3, VOCABULARY, (draw(longest),), generator=generator).tolist()
        requests.append(ask(prompt, draw(longest), **settings))
    return requests


def generate_greedily(model: Any, request: TokenRequest) -> list[int]:
    """The tokens of Transformers' generate(), also after the end of the text."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([request.prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
    )
    return found[0, len(request.prompt) :].tolist()


def alone(requests: Sequence[TokenRequest], **settings: Any) -> list[TokenRequest]:
    return [replace(request, **settings) for request in requests]
