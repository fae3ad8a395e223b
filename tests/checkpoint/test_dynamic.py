from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.checkpoint.dynamic import build_dynamic, resolve_dynamic
from halfbyte.errors import CheckpointError

BASE = {"bits": 4, "group_size": 128, "sym": True}
SAME = (("bits", 4), ("group_size", 128), ("sym", True))
EIGHT = (("bits", 8), ("group_size", 128), ("sym", True))
SMALL = (("bits", 4), ("group_size", 64), ("sym", True))
SKIPPED = None

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


def attention(rule_of, layers=range(3)):
    return {
        f"model.layers.{layer}.{name}": rule_of(layer, name) for layer in layers for name in LINEARS
    }


def settings_of(dynamic, module):
    found = resolve_dynamic(dynamic, module)
    return None if found is None else {**BASE, **found}


def assert_describes(rules):
    dynamic = build_dynamic(rules, BASE)
    for module, rule in rules.items():
        assert settings_of(dynamic, module) == (None if rule is None else dict(rule)), module
        assert settings_of(dynamic, "x." + module) == BASE
        assert settings_of(dynamic, module + "x") == BASE
    for key in dynamic:
        assert re.fullmatch(r"[+-]:\^.*\$", key)
    return dynamic


def test_uniform_model_needs_no_rules():
    assert build_dynamic(attention(lambda *_: SAME), BASE) == {}


def test_same_linear_of_all_blocks_is_one_pattern():
    rules = attention(lambda _, name: SMALL if name.endswith("o_proj") else SAME)
    assert assert_describes(rules) == {
        r"+:^model\.layers\.\d+\.self_attn\.o_proj$": {"group_size": 64}
    }


def test_skips_stand_first_and_blocks_are_listed():
    rules = attention(lambda layer, name: SKIPPED if layer and "o_proj" in name else EIGHT)
    dynamic = assert_describes(rules | {"lm_head": SKIPPED})
    assert list(dynamic)[:2] == [
        r"-:^model\.layers\.(?:1|2)\.self_attn\.o_proj$",
        r"-:^lm_head$",
    ]
    assert all(value == ({} if key[0] == "-" else {"bits": 8}) for key, value in dynamic.items())


@pytest.mark.parametrize("rule", [SKIPPED, EIGHT])
def test_fused_name_follows_when_all_its_parts_agree(rule):
    """vLLM looks up the rule of qkv_proj, which is in no file."""
    rules = attention(lambda layer, name: rule if layer == 1 and "o_proj" not in name else SAME)
    dynamic = assert_describes(rules)
    fused = settings_of(dynamic, "model.layers.1.self_attn.qkv_proj")
    assert fused == (None if rule is None else dict(rule))
    assert settings_of(dynamic, "model.layers.0.self_attn.qkv_proj") == BASE


def test_fused_name_stays_out_when_one_part_differs():
    rules = attention(lambda layer, name: EIGHT if layer == 1 and "q_proj" in name else SAME)
    dynamic = assert_describes(rules)
    assert settings_of(dynamic, "model.layers.1.self_attn.qkv_proj") == BASE


def experts(rule_of, layers=2, count=3):
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}": rule_of(layer, expert, name)
        for layer in range(layers)
        for expert in range(count)
        for name in ("gate_proj", "up_proj", "down_proj")
    }


def test_container_of_experts_follows_when_all_agree():
    """vLLM looks up the rule of the container, GPTQModel that of each expert."""
    dynamic = assert_describes(experts(lambda layer, *_: EIGHT if layer else SAME))
    assert settings_of(dynamic, "model.layers.1.mlp.experts") == dict(EIGHT)
    assert settings_of(dynamic, "model.layers.0.mlp.experts") == BASE
    assert len(dynamic) == 1


def test_container_of_experts_stays_out_when_one_differs():
    dynamic = assert_describes(
        experts(lambda layer, expert, _: SKIPPED if layer or expert == 1 else SAME)
    )
    assert settings_of(dynamic, "model.layers.0.mlp.experts") == BASE
    assert settings_of(dynamic, "model.layers.1.mlp.experts") is None


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_rules_describe_every_assignment(data):
    names = [
        *attention(lambda *_: SAME),
        *experts(lambda *_: SAME),
        "lm_head",
        "model.mlp.0",
        "model.mlp.2",
        "0",
        "visual.blocks.1.attn.q_proj",
    ]
    rule = st.sampled_from([SAME, SAME, SAME, EIGHT, SMALL, SKIPPED])
    assert_describes({name: data.draw(rule) for name in names})


def test_first_pattern_that_matches_counts():
    dynamic = {"+:a": {"bits": 8}, "-:a.b": {}, "c": {"bits": 2}}
    assert resolve_dynamic(dynamic, "a.b") == {"bits": 8}
    assert resolve_dynamic(dynamic, "c.d") == {"bits": 2}
    assert resolve_dynamic(dynamic, "x.a") == {}


def test_pattern_that_is_not_a_regular_expression_is_refused():
    with pytest.raises(CheckpointError, match=r"'-:\(a' is not a regular expression"):
        resolve_dynamic({"-:(a": {}}, "x")


def test_pattern_that_backtracks_endlessly_is_refused(monkeypatch):
    monkeypatch.setattr("halfbyte.checkpoint.foreign_patterns.MAX_MATCH_SECONDS", 0.1)
    pattern = r"(\w|\w\w|\.)+$"
    with pytest.raises(CheckpointError, match=r"takes more than 0.1 s to match model.layers.0"):
        resolve_dynamic({pattern: {}}, "model.layers.0.self_attn.q_proj.of.a.longer.name!")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a?){4000000000}",
        "((a{1000}){1000}){1000}",
        "+:(a?){3000000000,}",
        "(?x)(a?){ 4 0 0 0 0 0 0 0 0 }",
        "#(?x:(a?){4#{\n00000000})",
        "(a?){0000000000000000000004000000000}",
        f"a{{{'9' * 5000}}}",
    ],
)
def test_pattern_with_too_many_repeats_is_refused_before_it_is_compiled(pattern):
    """Compiling one of them would take gigabytes, or crash the interpreter."""
    with pytest.raises(CheckpointError) as caught:
        resolve_dynamic({"b": {}, pattern: {}}, "a")
    assert f"'{pattern[:80]}' has too many counted repeats" in str(caught.value)
    assert "200000 are allowed" in str(caught.value)


def test_pattern_that_runs_out_of_memory_is_refused(monkeypatch):
    def run_out(*_, **__):
        raise MemoryError

    monkeypatch.setattr("halfbyte.checkpoint.foreign_patterns.regex.match", run_out)
    with pytest.raises(CheckpointError, match=r"'-:\(\?R\)' takes too much memory to match a.b"):
        resolve_dynamic({"-:(?R)": {}}, "a.b")


def test_repeats_of_all_patterns_count_together():
    dynamic = {f"b{{19000}}{letter}": {} for letter in "acdefghijklm"}
    with pytest.raises(CheckpointError, match=r"'b\{19000\}c' has .* at least 342000 characters"):
        resolve_dynamic(dynamic, "a")


def test_usual_repeats_are_allowed():
    pattern = r"model\.layers\.(\d{2}|1\d{2})\.mlp\.[a-z_]{1,4000000000}"
    assert resolve_dynamic({pattern: {"bits": 8}}, "model.layers.17.mlp.up_proj") == {"bits": 8}


def test_pattern_with_an_unreadable_count_is_refused():
    with pytest.raises(CheckpointError, match="is not a regular expression: Exceeds the limit"):
        resolve_dynamic({f"a{{1,{'9' * 5000}}}": {}}, "a")


def test_patterns_do_not_depend_on_the_hash_seed() -> None:
    """The iteration order of sets differs between processes; that of the config must not."""
    program = (
        "from halfbyte.checkpoint.dynamic import build_dynamic; import json;"
        "names = ['m.%d.%s' % (i, n) for i in range(2) for n in ('a.q', 'a.o', 'b.u', 'b.d')];"
        "print(json.dumps(build_dynamic(dict.fromkeys(names), {'bits': 4})))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        ).stdout
        for seed in range(4)
    }
    assert len(found) == 1, found
