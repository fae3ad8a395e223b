"""litellm and guidellm ask our server; Ray reads our configuration; we stand before a real vLLM."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request

import openai
import pytest
from bench.peers.environments import PEERS
from tests.cli.test_serve import running
from tests.docs.test_docs import ROOT, code_blocks
from tests.interop.peers import needs, peer_environ, run_program
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


@needs("guidellm")
def test_guidellm_loads_ours_and_counts_what_we_count(tmp_path):
    model = write_model(tmp_path / "tiny", positions=1024)
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    # Its own way to say what is asked; the tokenizer is the model's, from its folder.
    options = {
        "--profile": "kind=concurrent,streams=4",
        "--constraint": "kind=max_requests,count=24",
        "--tokenizer": f"kind=huggingface_auto,model={model}",
        "--data": "kind=synthetic_text,prompt_tokens=40,output_tokens=16",
        "--output": f"kind=json,path={tmp_path / 'found.json'}",
    }
    with running(model, "--chat-template", template, "--cache-gb", "0.01") as (_, address, _):
        options["--backend"] = f"kind=openai_http,target={address},model=tiny"
        words = [word for option in options.items() for word in option]
        guidellm = PEERS["guidellm"].folder / "bin" / "guidellm"
        done = subprocess.run(
            [guidellm, "run", *words, "--disable-console"],
            cwd=tmp_path,
            env=peer_environ(),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        with urllib.request.urlopen(f"{address}/metrics") as reply:
            ours = dict(re.findall(r"^(halfbyte:\w+)\{.*\} (\S+)$", reply.read().decode(), re.M))
    (benchmark,) = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals == {"successful": 24, "errored": 0, "incomplete": 0, "total": 24}
    told = benchmark["requests"]["successful"]
    assert {one["output_metrics"]["text_tokens"] for one in told} == {16}
    prompts = sum(one["input_metrics"]["text_tokens"] for one in told)
    assert prompts == float(ours["halfbyte:prompt_tokens_total"])
    assert float(ours["halfbyte:generation_tokens_total"]) == 24 * 16


@needs("ray")
def test_ray_reads_the_documented_configuration(tmp_path):
    (config,) = code_blocks(ROOT / "docs" / "how-to" / "serve.md", "yaml")
    (tmp_path / "llm.yaml").write_text(config)
    job = {"config": tmp_path / "llm.yaml", "out": tmp_path / "found"}
    run_program(PEERS["ray"], "ray_check", job, tmp_path)
    assert json.loads((tmp_path / "found").read_text()) == {
        "import_path": "ray.serve.llm:build_openai_app",
        "port": 8100,
        "unknown": [],
        "models": ["my-model-4bit"],
        "engine_kwargs": [{"max_model_len": 8192, "tensor_parallel_size": 2}],
        "replicas": [[1, 4]],
    }


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
