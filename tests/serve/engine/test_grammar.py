"""Constrained answers of a model with random weights, which would never match a grammar itself."""

from __future__ import annotations

import asyncio
import json
import re
import shutil

import pytest
from tests.serve.helpers_engine import ask, collect, open_tiny, runners, write_model
from transformers import AutoTokenizer

from halfbyte.errors import ServeError
from halfbyte.serve.assembly import open_embedded
from halfbyte.serve.backend import Call, Delta
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.serve.engine.contract import Ended, Generated, Grammar
from halfbyte.serve.engine.grammar import Grammars

pytest.importorskip("llguidance")

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
LARK = 'start: greeting " " /[a-z]{2,4}/\ngreeting: "hello" | "good day"'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


def answer(folder, grammar, runner="transformers", **settings):
    """Text and last event of one answer."""
    settings = {"temperature": 1.0, "seed": 4, "ignore_end": False, **settings}

    async def run():
        async with open_tiny(folder, runner) as engine:
            return await collect(engine, ask([20, 21], 120, grammar=grammar, **settings))

    events = asyncio.run(run())
    ids = [event.scored.token for event in events if isinstance(event, Generated)]
    return AutoTokenizer.from_pretrained(folder).decode(ids), events[-1]


@pytest.mark.parametrize("runner", runners())
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answer_matches_a_regular_expression(folder, runner, temperature):
    pattern = r"[a-f]{3}-[0-9]{2}"
    grammar = Grammar(kind="regex", text=pattern)
    text, ended = answer(folder, grammar, runner, temperature=temperature)
    assert re.fullmatch(pattern, text)
    assert ended == Ended(reason="grammar")


def test_answer_matches_a_json_schema(folder):
    # Bytes of random weights seldom are UTF-8: letters are made likelier.
    bias = dict.fromkeys([*range(68, 94), 4, 14], 6.0)
    text, _ = answer(folder, Grammar(kind="json_schema", text=SCHEMA), logit_bias=bias)
    found = json.loads(text)
    assert set(found) == {"name", "age"}
    assert len(found["name"]) <= 6
    assert isinstance(found["age"], int)


def test_answer_is_one_of_the_choices(folder):
    choices = ['say "yes"', "no\n", "vielleicht"]
    grammar = Grammar(kind="choice", text=json.dumps(choices))
    found = {answer(folder, grammar, seed=seed)[0] for seed in range(6)}
    assert found <= set(choices)
    assert len(found) > 1


def test_answer_matches_a_lark_grammar(folder):
    text, _ = answer(folder, Grammar(kind="lark", text=LARK))
    assert re.fullmatch(r"(hello|good day) [a-z]{2,4}", text)


def test_json_object_starts_as_an_object(folder):
    text, _ = answer(folder, Grammar(kind="json_object"))
    assert text.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar(kind="regex", text="a("), "this regex"),
        (Grammar(kind="json_schema", text="{"), "this json_schema"),
        (Grammar(kind="json_schema", text='{"type": "nothing"}'), "nothing"),
        (Grammar(kind="choice", text="[]"), "a JSON list of at least one string"),
        (Grammar(kind="choice", text='["a", 1]'), "every choice must be a non-empty string"),
        (Grammar(kind="lark", text="start: missing"), "missing"),
        (Grammar(kind="regex", text="a" * 100_001), "100001 characters, at most 100000 are"),
    ],
)
def test_invalid_grammars_are_rejected(folder, grammar, words):
    with pytest.raises(ServeError) as caught:
        answer(folder, grammar)
    assert (caught.value.status, caught.value.code) == (400, "invalid_grammar")
    assert caught.value.param == "response_format"
    assert words in str(caught.value)


def test_first_mask_is_computed_while_the_grammar_is_compiled(folder):
    # Only the first mask shows that this schema allows nothing; it must not delay other requests.
    text = '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}'
    with pytest.raises(ServeError, match=r"Cannot continue an answer with this grammar"):
        Grammars(lambda: AutoTokenizer.from_pretrained(folder), 300, [1]).compile(
            Grammar(kind="json_schema", text=text)
        )


def test_grammars_do_not_need_the_models_folder_any_more(tmp_path):
    # As when garbage collection removes a version that is still served.
    folder = write_model(tmp_path / "model")
    backend = open_embedded(folder, ServeConfig(), EngineConfig(cache_gb=0.01), name="m")
    shutil.rmtree(folder)
    form = {"structured_outputs": {"choice": ["yes"]}}
    call = Call(
        kind="completion", body={"model": "m", "prompt": [20], "max_tokens": 9, **form}, id=""
    )

    async def run():
        try:
            return [event async for event in backend.stream(call)]
        finally:
            await backend.close()

    text = "".join(event.text for event in asyncio.run(run()) if isinstance(event, Delta))
    assert text == "yes"
