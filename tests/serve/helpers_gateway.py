"""A gateway with keys, over an engine of scripted answers."""

from __future__ import annotations

from tests.serve.helpers_scripted import ScriptedEngine
from tests.serve.helpers_text import make_tokenizer

from halfbyte.serve.adapters import AdapterFolder
from halfbyte.serve.api.gateway import Gateway
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.embedded import EmbeddedBackend
from halfbyte.serve.keys import ApiKeys
from halfbyte.serve.routing.router import Router

SECRET = "s3cret-of-ann"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
JSON = {"Content-Type": "application/json"}


def make_gateway(config=None, keys=(), adapters=None, **engine):
    config = config or ServeConfig()
    engine = ScriptedEngine(tokenizer=make_tokenizer(), **engine)
    backend = EmbeddedBackend(engine, engine.tokenizer, model="tiny", config=config)
    control = None if adapters is None else AdapterFolder(adapters, lambda: backend)
    gateway = Gateway(
        backend=backend,
        router=Router(backend),
        config=config,
        keys=ApiKeys.parse(keys),
        adapters=control,
        metrics=lambda: "metric 1\n",
    )
    return gateway, engine


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}
