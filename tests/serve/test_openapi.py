"""Requests and answers checked against OpenAI's OpenAPI document, which comes with llm-comply.

Schemathesis generates valid and invalid bodies from the document. No response may be a 5xx; a 200
must conform to the document, each chunk of a stream too; all others must be errors in OpenAI's
format.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from functools import cache
from importlib import resources

import httpx2
import jsonschema_rs
import llm_comply.tests.openai_chat as comply
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from llm_comply.config import ComplianceConfig
from llm_comply.runner import TestRunner
from llm_comply.schema import SpecLoader
from schemathesis import GenerationMode
from tests.serve.helpers_scripted import ScriptedEngine
from tests.serve.helpers_server import serve
from tests.serve.helpers_text import make_tokenizer

from halfbyte.serve.api.gateway import Gateway
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.embedded import EmbeddedBackend
from halfbyte.serve.routing.router import Router

# Or pytest would collect what only is called so.
TestRunner.__test__ = False
POSTS = ("/chat/completions", "/completions")
ANSWERS = {
    "/chat/completions": ("CreateChatCompletionResponse", "CreateChatCompletionStreamResponse"),
    "/completions": ("CreateCompletionResponse", "CreateCompletionResponse"),
}
SPEC = resources.files("llm_comply") / "specs" / "openai_chat.json"
FORCED = '[{"name": "get_weather", "arguments": {"location": "Rome"}}]'


@cache
def document():
    """The document, reduced to three paths, with our model's name in it."""
    spec = json.loads(SPEC.read_text())
    paths = {path: {"post": spec["paths"][path]["post"]} for path in POSTS}
    paths["/models"] = {"get": spec["paths"]["/models"]["get"]}
    schemas = spec["components"]["schemas"]
    schemas["ModelIdsShared"] = {"type": "string", "enum": ["tiny"]}
    schemas["CreateCompletionRequest"]["properties"]["model"] = {"type": "string", "enum": ["tiny"]}
    # An echoed prompt's first token has no likelihood; OpenAI's servers say null there as well.
    choice = schemas["CreateCompletionResponse"]["properties"]["choices"]["items"]
    logprobs = choice["properties"]["logprobs"]["properties"]
    for name in ("token_logprobs", "top_logprobs"):
        logprobs[name]["items"]["nullable"] = True
    # The description of the next two says null; the schema forgot it.
    usage = {"allOf": [{"$ref": "#/components/schemas/CompletionUsage"}], "nullable": True}
    for name in ("CreateChatCompletionStreamResponse", "CreateCompletionResponse"):
        schemas[name]["properties"]["usage"] = usage
    # A chunk of a completion has no finish yet.
    choice["properties"]["finish_reason"]["nullable"] = True
    choice["properties"]["finish_reason"]["enum"].append(None)
    close_requests(schemas)
    return {**spec, "paths": paths}


def close_requests(schemas):
    """Let generated requests have only the document's fields; else most would be rejected.

    The document leaves objects open; a chat's request is several, which are put together here.
    """
    chat = {"type": "object", "properties": {}, "required": []}

    def gather(part):
        part = schemas[part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        for inner in part.get("allOf", ()):
            gather(inner)
        chat["properties"].update(part.get("properties", {}))
        chat["required"] += part.get("required", [])

    gather(schemas["CreateChatCompletionRequest"])
    schemas["CreateChatCompletionRequest"] = chat
    for name, schema in schemas.items():
        asked = name in ("CreateChatCompletionRequest", "CreateCompletionRequest")
        if asked or name.startswith(("ChatCompletionRequest", "ChatCompletionStreamOptions")):
            close(schema)


def close(node):
    if isinstance(node, dict):
        if "properties" in node:
            node.setdefault("additionalProperties", False)
        for value in node.values():
            close(value)
    elif isinstance(node, list):
        for value in node:
            close(value)


@cache
def validator(name):
    """A validator of a named schema, with OpenAPI's `nullable` converted to JSON Schema."""

    def convert(node):
        if isinstance(node, list):
            return [convert(entry) for entry in node]
        if not isinstance(node, dict):
            return node
        node = {key: convert(value) for key, value in node.items()}
        if node.pop("nullable", False):
            return {"anyOf": [node, {"type": "null"}]}
        return node

    spec = document()
    components = convert(copy.deepcopy(spec["components"]))
    schema = {"$ref": f"#/components/schemas/{name}", "components": components}
    return jsonschema_rs.Draft202012Validator(schema)


@pytest.fixture(scope="module")
def server():
    tokenizer = make_tokenizer()
    # The empty text stands in every prompt. Requests for 128 choices are among the made ones.
    script = {"": "Hi, 日本 🙂!", "San Francisco": FORCED}
    config = ServeConfig(default_max_tokens=100)
    engine = ScriptedEngine(tokenizer=tokenizer, script=script, context=4096)
    backend = EmbeddedBackend(engine, tokenizer, model="tiny", config=config)
    with serve(Gateway(backend=backend, router=Router(backend), config=config)) as running:
        yield running
    assert running.gateway.limits.running == 0
    assert engine.running == 0


def check(path, reply):
    """Check that an answer conforms to the document."""
    assert reply.status_code < 500, reply.text
    if reply.status_code != 200:
        assert 400 <= reply.status_code < 500, reply.status_code
        validator("ErrorResponse").validate(reply.json())
        return
    whole, chunk = ANSWERS[path]
    if reply.headers["content-type"].startswith("application/json"):
        validator(whole).validate(reply.json())
        return
    lines = [line for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        validator(chunk).validate(json.loads(line.removeprefix("data: ")))


def run_cases(server, path, mode, count):
    """Send generated bodies; return how many answers had which status."""
    schema = schemathesis.openapi.from_dict(document())
    schema.config.update(base_url=server.v1)
    statuses = Counter()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=schema[path]["POST"].as_strategy(generation_mode=mode))
    def send(case):
        reply = post(client, case)
        statuses[reply.status_code] += 1
        check(path, reply)

    with httpx2.Client(timeout=300) as client:
        send()
    return statuses


def post(client, case):
    """Send a case with a client that reads streams to their end; schemathesis' own does not."""
    made = case.as_transport_kwargs()
    content = json.dumps(made["json"]).encode() if "json" in made else made.get("data")
    headers = {"Content-Type": "application/json"}
    return client.request(made["method"], made["url"], headers=headers, content=content)


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_generated_bodies(server, path, mode):
    statuses = run_cases(server, path, mode, 75)
    assert sum(statuses.values()) >= 70


@pytest.mark.slow
@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_ten_thousand_generated_bodies(server, path, mode):
    statuses = run_cases(server, path, mode, 2500)
    assert sum(statuses.values()) >= 2500, statuses


def test_list_of_models(server):
    schema = schemathesis.openapi.from_dict(document())
    schema.config.update(base_url=server.v1)
    reply = post(httpx2, schema["/models"]["GET"].Case())
    validator("ListModelsResponse").validate(reply.json())


@given(
    stream=st.booleans(),
    include_usage=st.booleans(),
    logprobs=st.integers(0, 3),
    n=st.integers(1, 3),
    echo=st.booleans(),
    tokens=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_answers_of_valid_requests(server, stream, include_usage, logprobs, n, echo, tokens):
    more = {"n": n, "stream": stream}
    if stream:
        more["stream_options"] = {"include_usage": include_usage}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], **more}
    if logprobs:
        chat |= {"logprobs": True, "top_logprobs": logprobs}
    text = {"model": "tiny", "prompt": "hello", "echo": echo, "max_tokens": tokens, **more}
    if logprobs:
        text["logprobs"] = logprobs
    for path, body in (("/chat/completions", chat), ("/completions", text)):
        reply = httpx2.post(server.v1 + path, json=body)
        assert reply.status_code == 200, reply.text
        check(path, reply)


@pytest.mark.filterwarnings("ignore:jsonschema.RefResolver is deprecated")
def test_llm_comply(server):
    config = ComplianceConfig(base_url=server.v1, api_key="none", model="tiny")
    spec = SpecLoader(str(SPEC))
    # The model reads no images.
    tests = [test for test in comply.OPENAI_CHAT_TESTS if test.id != "chat-image-input"]
    suite = TestRunner(config, tests, spec).run_all()
    found = {
        result.id: (result.status.name, result.errors, result.warnings) for result in suite.results
    }
    assert found.pop("chat-reasoning-summary")[0] == "SKIPPED"
    # Its check wants a finish in each chunk, which OpenAI's own streams have as null.
    assert {name: entry for name, entry in found.items() if entry[:2] != ("PASSED", [])} == {}
    assert [entry[2] for entry in found.values() if entry[2]] == []
    assert len(found) == 7
