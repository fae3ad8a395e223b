"""Loading an engine from a folder."""

from __future__ import annotations

import asyncio
import threading

import pytest
from tests.serve.helpers_engine import write_model

from halfbyte.errors import ConfigError
from halfbyte.serve.engine import loading
from halfbyte.serve.engine.config import EngineConfig


def test_a_model_is_loaded_in_a_thread_that_ends(tmp_path, monkeypatch):
    """Otherwise OpenMP has more threads than processors, and they sleep between layers."""
    used = []
    load = loading.load_model

    def note(*arguments, **keywords):
        used.append(threading.current_thread())
        return load(*arguments, **keywords)

    monkeypatch.setattr(loading, "load_model", note)
    engine = loading.open_engine(write_model(tmp_path), EngineConfig(cache_gb=0.05))
    (thread,) = used
    assert thread is not threading.current_thread()
    thread.join(10)
    assert not thread.is_alive()
    asyncio.run(engine.close())


def test_loading_errors_are_raised_in_the_caller(tmp_path):
    config = EngineConfig(cache_gb=0.05, context=10**6)
    with pytest.raises(ConfigError, match="context is 1000000; the model supports at most"):
        loading.open_engine(write_model(tmp_path), config)
