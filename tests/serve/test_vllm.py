"""vLLM started, watched and stopped; a stand-in program takes its place."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from tests.helpers.tiny_gptq import TinyLinear, write_model
from tests.serve.stand_in_vllm import ANSWER

from halfbyte.errors import ConfigError, ServeError
from halfbyte.serve.adapters import AdapterFolder
from halfbyte.serve.backend import Call, Delta
from halfbyte.serve.vllm import Supervision, VllmBackend
from halfbyte.serve.vllm_command import check_for_vllm, find_rank, make_command

QUICK = Supervision(
    starts_within=60,
    looks_every=0.1,
    answers_within=0.3,
    hung_after=1,
    first_pause=0.1,
    ends_within=3,
)


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """Give the stand-in's place; what it saw is written beside it."""
    program = tmp_path / "vllm"
    script = Path(__file__).with_name("stand_in_vllm.py")
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("STAND_IN_FOLDER", str(tmp_path))
    # Set where these tests run in CI, and no secret.
    monkeypatch.delenv("HALFBYTE_REQUIRE_NATIVE", raising=False)
    monkeypatch.setenv("HALFBYTE_API_KEYS", "ann:secret-of-ann")
    return program


def starts(program):
    return [json.loads(path.read_text()) for path in sorted(program.parent.glob("start-*"))]


@asynccontextmanager
async def running(program, supervision=QUICK, **settings):
    settings = {"name": "tiny", "template": None, **settings}
    command = make_command(Path("m"), executable=str(program), **settings)
    backend = VllmBackend(command, model="tiny", supervision=supervision)
    try:
        await backend.start()
        yield backend
    finally:
        await backend.close()


async def ask(backend, content="hello", model="tiny"):
    messages = [{"role": "user", "content": content}]
    call = Call(kind="chat", body={"model": model, "messages": messages}, id="x")
    events = [event async for event in backend.stream(call)]
    return "".join(event.text for event in events if isinstance(event, Delta))


async def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


def test_started_asked_and_stopped(vllm, caplog):
    async def run():
        async with running(vllm) as backend:
            assert await backend.is_ready()
            assert await ask(backend) == ANSWER
            process = psutil.Process(backend._process.pid)
        assert not process.is_running()
        assert not await backend.is_ready()

    asyncio.run(run())
    (start,) = starts(vllm)
    words = start["argv"]
    assert words[:4] == ["serve", "m", "--served-model-name", "tiny"]
    assert words[words.index("--host") + 1] == "127.0.0.1"
    # The gateway's own secrets are not handed on, and the new one is in no argument.
    assert start["keys"] == []
    assert len(words) == 10
    assert start["int8"] == "0"


def test_who_wants_int8_activations_gets_them(vllm, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "1")

    async def run():
        async with running(vllm):
            pass

    asyncio.run(run())
    assert [start["int8"] for start in starts(vllm)] == ["1"]


def test_crash_is_an_error_for_one_and_it_comes_back(vllm, caplog):
    async def run():
        async with running(vllm) as backend:
            with pytest.raises(ServeError) as caught:
                await ask(backend, "crash")
            assert caught.value.status in (502, 503)

            async def is_down():
                return not await backend.is_ready()

            await until(is_down)
            with pytest.raises(ServeError, match="being started again") as caught:
                await ask(backend)
            assert (caught.value.status, caught.value.retry_after) == (503, 15.0)
            await until(backend.is_ready)
            assert await ask(backend) == ANSWER
            assert backend.restarts == 1

    asyncio.run(run())
    assert "ended with exit code 3" in caplog.text
    assert len(starts(vllm)) == 2


def test_hung_process_is_killed_and_started_again(vllm, caplog):
    async def run():
        async with running(vllm) as backend:
            hung = asyncio.create_task(ask(backend, "hang"))
            while not backend.restarts:
                await asyncio.sleep(0.05)
            with pytest.raises(ServeError):
                await hung
            await until(backend.is_ready)
            assert await ask(backend) == ANSWER

    asyncio.run(run())
    assert "has not answered for 1 s" in caplog.text


def test_refusal_at_the_start_is_told_with_its_last_words(vllm):
    (vllm.parent / "refuse").touch()

    async def run():
        async with running(vllm):
            pass

    with pytest.raises(ConfigError, match="ValueError: this model is not supported"):
        asyncio.run(run())


def test_process_that_cannot_come_back_is_tried_ever_more_slowly(vllm):
    async def run():
        async with running(vllm) as backend:
            (vllm.parent / "refuse").touch()
            with pytest.raises(ServeError):
                await ask(backend, "crash")
            while backend.restarts < 3:
                await asyncio.sleep(0.05)
            assert not await backend.is_ready()
            (vllm.parent / "refuse").unlink()
            await until(backend.is_ready)

    asyncio.run(run())


@pytest.fixture
def adapters(tmp_path):
    """One adapter, and one that lacks its tensors."""
    for name in ("red", "broken"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "adapter_config.json").write_text('{"r": 24}')
    (tmp_path / "adapters" / "red" / "adapter_model.safetensors").touch()
    return tmp_path / "adapters"


def test_adapters_come_and_go_and_are_there_again_after_a_crash(vllm, adapters, caplog):
    async def run():
        async with running(vllm, adapters=adapters) as backend:
            control = AdapterFolder(adapters, lambda: backend)
            await control.load("red")
            assert backend.models == ("tiny", "red")
            assert await ask(backend, model="red") == f"{ANSWER} By red."
            assert await ask(backend) == ANSWER
            with pytest.raises(ServeError, match=r"'broken'.* doesn't contain tensors") as caught:
                await control.load("broken")
            assert caught.value.status == 400
            assert str(adapters) not in str(caught.value)
            with pytest.raises(ServeError, match="already served"):
                await control.load("red")
            with pytest.raises(ServeError):
                await ask(backend, "crash")
            while not backend.restarts:
                await asyncio.sleep(0.02)
            with pytest.raises(ServeError, match="does not answer") as caught:
                await control.load("broken")
            assert caught.value.status == 503
            await until(backend.is_ready)
            assert await ask(backend, model="red") == f"{ANSWER} By red."
            await control.unload("red")
            assert backend.models == ("tiny",)
            # By another name than its own it is what the fallbacks of other servers ask for.
            assert await ask(backend, model="red") == ANSWER
            with pytest.raises(ServeError, match=r"red is not loaded\. Loaded adapters: none"):
                await control.unload("red")

    asyncio.run(run())


def test_an_adapter_that_is_gone_does_not_keep_the_model_from_coming_back(vllm, adapters, caplog):
    async def run():
        async with running(vllm, adapters=adapters) as backend:
            await AdapterFolder(adapters, lambda: backend).load("red")
            (adapters / "red" / "adapter_model.safetensors").unlink()
            with pytest.raises(ServeError):
                await ask(backend, "crash")
            while not backend.restarts:
                await asyncio.sleep(0.02)
            await until(backend.is_ready)
            assert backend.models == ("tiny",)
            assert await ask(backend) == ANSWER

    asyncio.run(run())
    assert "The adapter red is not served any more" in caplog.text


def test_rank_is_enough_for_the_adapters_that_are_there(adapters, vllm):
    assert find_rank(adapters) == 32
    words = make_command(
        Path("m"), executable=str(vllm), name="n", template=None, adapters=adapters
    )
    assert words[-3:] == ["--enable-lora", "--max-lora-rank", "32"]
    (adapters / "red" / "adapter_config.json").write_text('{"r": 8, "rank_pattern": {"q": 129}}')
    assert find_rank(adapters) == 256
    for nonsense in ("{}", "[]", "no JSON", '{"r": "many"}', '{"r": 8, "rank_pattern": []}'):
        for name in ("red", "broken"):
            (adapters / name / "adapter_config.json").write_text(nonsense)
        assert find_rank(adapters) == 16
    with pytest.raises(ConfigError, match=r"folder of adapters '.*none' does not exist"):
        find_rank(adapters / "none")


def test_flags_follow_from_the_checkpoint(vllm):
    words = make_command(
        Path("m"),
        executable=str(vllm),
        name="n",
        template="{% if tools %}<tool_call>",
        template_file=Path("t.jinja"),
        context=2048,
        dtype="bfloat16",
        more=["--tensor-parallel-size=2"],
    )
    text = " ".join(words)
    assert "--max-model-len 2048 --dtype bfloat16 --chat-template t.jinja" in text
    assert "--enable-auto-tool-choice --tool-call-parser hermes --tensor-parallel-size=2" in text
    with pytest.raises(ConfigError, match="no program 'no-such-vllm'"):
        make_command(Path("m"), executable="no-such-vllm", name="n", template=None)


def test_checkpoint_that_vllm_refuses_is_refused_before(tmp_path):
    good = {"model.layers.0.mlp.down_proj": TinyLinear(in_features=128, out_features=64)}
    write_model(tmp_path / "good", good)
    check_for_vllm(tmp_path / "good", has_gpu=False)
    odd = {"model.layers.0.mlp.down_proj": TinyLinear(bits=3, in_features=128, out_features=64)}
    write_model(tmp_path / "odd", odd)
    for has_gpu in (False, True):
        with pytest.raises(ConfigError, match=r"vLLM cannot load .*--engine embedded"):
            check_for_vllm(tmp_path / "odd", has_gpu=has_gpu)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text("{}")
    check_for_vllm(tmp_path / "plain", has_gpu=False)
    assert os.environ.get("VLLM_API_KEY") is None


GATEWAY = """
import asyncio, sys
from halfbyte.serve.vllm import Supervision, VllmBackend

async def main():
    supervision = Supervision(looks_every=0.1, ends_within=1)
    backend = VllmBackend([sys.argv[1]], model="tiny", supervision=supervision)
    await backend.start()
    print(backend._process.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("stubborn", [False, True])
def test_gateway_that_is_killed_leaves_no_vllm(vllm, stubborn):
    if stubborn:
        (vllm.parent / "stubborn").touch()
    command = [sys.executable, "-c", GATEWAY, str(vllm)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as gateway:
        child = psutil.Process(int(gateway.stdout.readline()))
        assert "stand_in_vllm" in " ".join(child.cmdline())
        # Not those of the whole machine: other tests may run beside this one.
        group = [p for p in psutil.process_iter() if p.pid and os.getpgid(p.pid) == child.pid]
        assert len(group) == 2  # and the watcher
        gateway.kill()
    _, left = psutil.wait_procs(group, timeout=20)
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
