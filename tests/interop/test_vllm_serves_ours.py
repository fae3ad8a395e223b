"""Our checkpoint behind a real ``vllm serve`` on the loopback address."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress

import pytest
import torch
from bench.peers.environments import PEERS
from tests.interop.conftest import PROMPTS
from tests.interop.greedy import check_is_greedy
from tests.interop.peers import needs, peer_environ

PEER = PEERS["vllm"]

pytestmark = [pytest.mark.interop, needs("vllm")]

NEW_TOKENS = 48
STARTS_WITHIN = 600
"""Seconds; a minute is usual."""


class Server:
    """A running vLLM."""

    def __init__(self, url: str, process: subprocess.Popen):
        self.url = url
        self.process = process

    def ask(self, path, **body):
        request = urllib.request.Request(
            f"{self.url}{path}",
            json.dumps({"model": "ours", "temperature": 0, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.load(reply)["choices"][0]

    def is_up(self):
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(ours, tmp_path_factory):
    log = tmp_path_factory.mktemp("vllm") / "log.txt"
    port = _free_port()
    command = [PEER.folder / "bin" / "vllm", "serve", ours.folder, "--served-model-name", "ours"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "1024", "--generation-config", "vllm"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    # Or x is rounded to 8 bits where there is AMX, and a reply is off by more than a tie.
    settings["VLLM_CPU_INT4_W4A8"] = "0"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            env=peer_environ(VLLM_NO_USAGE_STATS="1", **settings),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Server(f"http://127.0.0.1:{port}", process)
    try:
        end = time.monotonic() + STARTS_WITHIN
        while not server.is_up():
            assert process.poll() is None, f"vllm serve ended:\n{log.read_text()[-4000:]}"
            assert time.monotonic() < end, f"vllm serve did not start:\n{log.read_text()[-4000:]}"
            time.sleep(1)
        assert "CPUWNA16LinearKernel" in log.read_text()
        yield server
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


def test_served_answers_are_ours_but_for_ties(ours, server):
    others = 0
    for text, prompt in zip(PROMPTS, ours.prompts, strict=True):
        reply = server.ask(
            "/v1/completions",
            prompt=text,
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            return_token_ids=True,
        )
        assert reply["prompt_token_ids"] == prompt
        assert len(reply["token_ids"]) == NEW_TOKENS
        others += check_is_greedy(ours.float32, ours.bfloat16, prompt, reply["token_ids"])
    assert others <= 0.05 * NEW_TOKENS * len(PROMPTS)


def test_served_model_reads_a_text_as_we_do(ours, server):
    """Half of our scales are negative: a kernel that took them for positive would show here."""
    found = []
    for window in ours.windows.tolist():
        reply = server.ask("/v1/completions", prompt=window, max_tokens=1, prompt_logprobs=1)
        by_token = reply["prompt_logprobs"][1:]
        pairs = zip(window[1:], by_token, strict=True)
        found.append([-seen[str(token)]["logprob"] for token, seen in pairs])
    nll, _ = ours.reading
    # Perplexity within a percent, where bfloat16 alone moves it by .2%.
    assert abs((torch.tensor(found).mean() - nll.mean()).item()) < 0.01


def test_served_model_takes_the_chat_template(ours, server):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    reply = server.ask(
        "/v1/chat/completions", messages=messages, max_tokens=16, return_token_ids=True
    )
    prompt = ours.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    check_is_greedy(ours.float32, ours.bfloat16, prompt["input_ids"], reply["token_ids"])
    words = ours.tokenizer.decode(reply["token_ids"], skip_special_tokens=True)
    assert reply["message"]["content"] == words
