"""A gateway on a real port, with an engine of scripted answers."""

from __future__ import annotations

import openai
import pytest
from tests.serve.helpers_openai import CALL
from tests.serve.helpers_scripted import ScriptedEngine
from tests.serve.helpers_server import serve
from tests.serve.helpers_text import make_tokenizer

from halfbyte.errors import ServeError
from halfbyte.serve.api.gateway import Gateway
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.embedded import EmbeddedBackend
from halfbyte.serve.routing.router import Router


@pytest.fixture(scope="module")
def engine():
    return ScriptedEngine(
        tokenizer=make_tokenizer(),
        script={
            "weather": f"Let me look.\n{CALL}",
            "twice": f"{CALL}\n{CALL}",
            "forced": '[{"name": "get_weather", "arguments": {"place": "Rome"}}]',
            "as json": '{"place": "Rome", "degrees": 21}',
            "say nothing": [],
            "busy": ServeError(
                "Full.",
                status=429,
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                retry_after=7,
            ),
            "long": "word " * 300,
        },
    )


@pytest.fixture(scope="module")
def server(engine):
    config = ServeConfig(default_max_tokens=200)
    backend = EmbeddedBackend(engine, engine.tokenizer, model="tiny", config=config)
    with serve(Gateway(backend=backend, router=Router(backend), config=config)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.v1, api_key="none", max_retries=0, timeout=20)
