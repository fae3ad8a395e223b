"""The engine's memory matches its plan."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.serve.helpers_engine import write_model

PROGRAM = """
import asyncio, json, sys
from halfbyte.serve.assembly import open_embedded
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.serve.engine.contract import Grammar, TokenRequest
from halfbyte.machine.memory import peak_memory_bytes

async def main(folder):
    from pathlib import Path
    backend = open_embedded(Path(folder), ServeConfig(), EngineConfig(cache_gb=0.2), name="m")
    engine, most = backend._engine, 0
    async def ask(**more):
        prompt = tuple(range(3, 103))
        values = {"prompt": prompt, "max_new_tokens": 40, "ignore_end": True} | more
        async for _ in engine.generate(TokenRequest(**values)):
            pass
    await asyncio.gather(*(ask() for _ in range(16)))
    await ask(grammar=Grammar(kind="json_object"), ignore_end=False)
    await backend.close()
    info = engine.info
    peak = peak_memory_bytes()
    print(json.dumps([peak, info.planned_bytes, info.cache_bytes, info.weight_bytes]))

asyncio.run(main(sys.argv[1]))
"""


def test_peak_memory_is_within_ten_percent_of_the_plan(tmp_path: Path):
    folder = write_model(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=True
    )
    peak, planned, cache, weights = json.loads(done.stdout.splitlines()[-1])
    assert 0 < cache + weights < planned
    assert abs(peak / planned - 1) < 0.1, (peak, planned)
