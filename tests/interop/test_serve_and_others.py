"""litellm asks our server; our server puts itself before a real vLLM."""

from __future__ import annotations

import json

import openai
import pytest
from bench.peers.environments import PEERS
from tests.cli.test_serve import running
from tests.interop.peers import needs, run_program
from tests.serve.helpers_engine import write_model
from tests.serve.helpers_text import TEMPLATE

pytestmark = pytest.mark.interop

KEY = "secret-of-the-test"


@pytest.mark.parametrize("peer", [pytest.param("litellm", marks=needs("litellm"))])
def test_litellm_reads_every_answer_of_ours(peer, tmp_path):
    model = write_model(tmp_path / "tiny", positions=1024)
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    with running(
        *(model, "--chat-template", template, "--cache-gb", "0.01"),
        HALFBYTE_API_KEYS=f"ann:{KEY}",
    ) as (_, address, _):
        job = {"address": f"{address}/v1", "model": "tiny", "key": KEY, "out": tmp_path / "found"}
        run_program(PEERS[peer], "litellm_ask", job, tmp_path)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY)
        messages = [{"role": "user", "content": "hello"}]
        own = client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_tokens=20
        )
    found = json.loads((tmp_path / "found").read_text())
    assert found["whole"] == found["streamed"] == own.choices[0].message.content
    assert found["usage"] == found["streamed_usage"] == own.usage.total_tokens
    assert found["call"][0] == "add"
    assert 0 <= found["call"][1]["a"] <= 99
    assert found["logprobs"] == own.usage.completion_tokens
    assert isinstance(found["text"], str)
    # Of all errors these three are told apart by what stands in ours.
    assert found["errors"] == [
        "ContextWindowExceededError",
        "NotFoundError",
        "AuthenticationError",
    ]


@needs("vllm")
def test_vllm_runs_our_checkpoint_behind_our_gateway(ours):
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    arguments = ["--vllm-arg=--enforce-eager", "--vllm-arg=--max-model-len=1024"]
    vllm = PEERS["vllm"].folder / "bin" / "vllm"
    with running(
        *(ours.folder, "--engine", "vllm", "--vllm-command", vllm, "--served-name", "ours"),
        *arguments,
        wait=900,
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        **settings,
    ) as (process, address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=300)
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        usual = {"model": "ours", "messages": messages, "temperature": 0, "max_tokens": 16}
        answer = client.chat.completions.create(logprobs=True, top_logprobs=2, **usual)
        choice = answer.choices[0]
        assert answer.usage.completion_tokens > 0
        assert "".join(token.token for token in choice.logprobs.content).startswith(
            choice.message.content[:5]
        )
        streamed = client.chat.completions.create(stream=True, **usual)
        assert "".join(c.choices[0].delta.content or "" for c in streamed) == choice.message.content
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**{**usual, "max_tokens": 10**6})
        process.terminate()
        assert process.wait(90) == 0
