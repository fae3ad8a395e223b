"""`halfbyte serve` as people start it: a process of its own, a real model, real clients."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import jsonschema
import openai
import pytest
from tests.serve import stand_in_vllm
from tests.serve.helpers_engine import write_model
from tests.serve.helpers_text import TEMPLATE

from halfbyte.cli.main import main

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("models") / "tiny", positions=1024)
    template = folder.parent / "template.jinja"
    template.write_text(TEMPLATE)
    return folder


@contextmanager
def running(*arguments, wait=120, **environment):
    """Start the command, wait until it says where it is, give the process, address and output."""
    command = [sys.executable, "-m", "halfbyte", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    lines = []
    found = threading.Event()

    def read():
        for line in process.stderr:
            lines.append(line)
            if "Ctrl-C" in line:
                found.set()
        found.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert found.wait(wait)
        match = re.search(r"at (http://[\d.:]+)/v1", "".join(lines))
        assert match, lines
        yield process, match[1], lines
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


@pytest.fixture(scope="module")
def server(model):
    with running(
        model, "--chat-template", model.parent / "template.jinja", "--cache-gb", "0.01"
    ) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[1]}/v1", api_key="x", max_retries=0, timeout=60)


def ask(client, **more):
    more = {"temperature": 0, "max_tokens": 24, **more}
    messages = [{"role": "user", "content": "hello"}]
    return client.chat.completions.create(model="tiny", messages=messages, **more)


def test_start_message_says_what_is_served(server):
    text = "".join(server[2])
    assert "Serving tiny at http://127.0.0.1:" in text
    assert re.search(r"KV cache 10\.0 MB = \d+ tokens, at most 1024 per request", text)
    assert "no API keys: this machine only" in text


def test_stream_and_whole_answer_are_the_same(client):
    whole = ask(client, logprobs=True, top_logprobs=2)
    chunks = list(
        ask(
            client,
            logprobs=True,
            top_logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    tokens = [
        token
        for c in chunks
        if c.choices and c.choices[0].logprobs
        for token in c.choices[0].logprobs.content
    ]
    assert [t.token for t in tokens] == [t.token for t in whole.choices[0].logprobs.content]
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_seed_gives_the_same_answer_again_and_another_another(client):
    answers = [
        ask(client, temperature=1, seed=seed).choices[0].message.content for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]
    several = ask(client, temperature=1, seed=1, n=2).choices
    assert several[0].message.content == answers[0]
    assert several[1].message.content == answers[2]


def test_answer_keeps_to_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    answer = ask(client, temperature=1, seed=3, max_tokens=100, response_format=form)
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content), schema)


def test_forced_call_has_arguments_by_its_schema(client):
    answer = ask(client, temperature=1, seed=4, max_tokens=200, tools=[ADD], tool_choice="required")
    assert answer.choices[0].finish_reason == "tool_calls"
    for call in answer.choices[0].message.tool_calls:
        assert call.function.name == "add"
        jsonschema.validate(json.loads(call.function.arguments), ADD["function"]["parameters"])


def test_schema_that_cannot_be_held_is_refused(client):
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": {"type": "no such"}}}
    with pytest.raises(openai.BadRequestError):
        ask(client, response_format=form)


def test_echo_rates_the_prompt(client):
    answer = client.completions.create(
        model="tiny", prompt="abc", echo=True, logprobs=1, max_tokens=0
    )
    choice = answer.choices[0]
    assert choice.text == "abc"
    assert choice.logprobs.tokens == ["a", "b", "c"]
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])


def test_request_larger_than_the_context_is_refused(client):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, max_tokens=1100)
    assert caught.value.code == "context_length_exceeded"


def test_metrics_count(server, client):
    ask(client)
    text = httpx2.get(f"{server[1]}/metrics").text
    assert re.search(r'halfbyte:request_success_total\{.*model_name="tiny"\} \d', text)


def test_sigterm_finishes_what_runs_and_ends_with_0(model):
    with running(model, HALFBYTE_API_KEYS="ann:secret-of-ann") as (process, address, lines):
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 300, "ignore_eos": True}
        headers = {"Authorization": "Bearer secret-of-ann"}
        assert httpx2.get(f"{address}/v1/models").status_code == 401
        url = f"{address}/v1/completions"
        with httpx2.stream(
            "POST", url, json={**body, "stream": True}, headers=headers, timeout=60
        ) as reply:
            received = reply.iter_lines()
            next(received)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in received if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert process.wait(20) == 0
    assert "1 API key" in "".join(lines)
    assert "secret-of-ann" not in "".join(lines)


def test_server_killed_in_the_middle_is_an_error_for_the_client(model):
    with running(model) as (process, address, _):
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 400, "ignore_eos": True}
        request = httpx2.stream(
            "POST", f"{address}/v1/completions", json={**body, "stream": True}, timeout=60
        )
        with request as reply:
            received = reply.iter_lines()
            assert next(received).startswith("data: ")
            process.kill()
            with pytest.raises(httpx2.HTTPError):
                list(received)


def test_upstream_is_served_by_the_same_command(server):
    with running("--upstream", f"{server[1]}/v1") as (_, address, lines):
        assert "Serving tiny at" in "".join(lines)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)
        assert ask(client).usage.completion_tokens > 0


def test_fallback_answers_for_an_upstream_that_is_gone(server):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{unused.getsockname()[1]}/v1#tiny"
        with running("--upstream", gone, "--fallback", f"{server[1]}/v1") as (_, address, lines):
            place = server[1].removeprefix("http://")
            assert f"fallback: tiny at {place}\n" in lines
            reply = httpx2.post(
                f"{address}/v1/completions",
                json={"model": "tiny", "prompt": "abc", "max_tokens": 4},
                timeout=60,
            )
            assert reply.status_code == 200, reply.text
            assert reply.headers["x-halfbyte-reason"] == "error"


def test_vllm_is_started_fronted_and_ended(model, tmp_path):
    program = tmp_path / "vllm"
    stand_in = Path(stand_in_vllm.__file__)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{stand_in}" "$@"\n')
    program.chmod(0o755)
    with running(
        *(model, "--engine", "vllm", "--vllm-command", program, "--vllm-arg=--seed=7"),
        STAND_IN_FOLDER=str(tmp_path),
    ) as (process, address, lines):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)
        assert ask(client).choices[0].message.content == stand_in_vllm.ANSWER
        assert "running in vLLM: " in "".join(lines)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    words = json.loads((tmp_path / "start-0").read_text())["argv"]
    assert words[1] == str(model)
    assert "--seed=7" in words
    with (
        pytest.raises(OSError),
        socket.create_connection(("127.0.0.1", int(words[words.index("--port") + 1]))),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "Cannot listen on 0.0.0.0 without an API key"),
        ([], "neither was given"),
        (["MODEL", "--upstream", "http://h/v1"], "both were given"),
        (["MODEL", "--adapters", "."], "--adapters needs an API key"),
        (["no-such-folder"], "'no-such-folder': no such folder"),
        (["no-such-folder", "--engine", "vllm"], "'no-such-folder': no such folder"),
        (["--port", "99999"], "port is 99999"),
        (["--api-key", "ann:short"], "'ann' has 5 characters"),
        (["--upstream", "localhost:8000"], "is not the address of a server"),
    ],
)
def test_wrong_settings_end_at_once(model, monkeypatch, capsys, arguments, said):
    monkeypatch.delenv("HALFBYTE_API_KEYS", raising=False)
    words = [str(model) if word == "MODEL" else word for word in arguments]
    start = time.monotonic()
    assert main(["serve", *words, *([] if "--port" in words else ["--port", "0"])]) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert time.monotonic() - start < 20


def test_taken_port_is_found_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "no-such-folder", "--port", str(port)]) == 2
    assert f"Cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "package"), [("assembly", "starlette"), ("running", "uvicorn")])
def test_without_the_extra_it_says_how_to_install_it(model, monkeypatch, capsys, module, package):
    monkeypatch.setitem(sys.modules, f"halfbyte.serve.{module}", None)
    assert main(["serve", str(model)]) == 1
    error = capsys.readouterr().err
    assert f"halfbyte serve needs the Python package '{package}'" in error
    assert 'pip install "halfbyte[serve]"' in error
