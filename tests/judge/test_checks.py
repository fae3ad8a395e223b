from __future__ import annotations

import pytest

from halfbyte.errors import ConfigError, MissingExtraError
from halfbyte.judge.checks import Check, load_functions, parse_check, parse_json


def passes(kind, value, text, functions=None, line=None):
    return Check(kind=kind, value=value).passes(text, line or {}, functions or {})


@pytest.mark.parametrize(
    ("kind", "value", "right", "wrong"),
    [
        ("equals", "Paris", [" paris.", "PARIS\n"], ["Paris, France", ""]),
        ("equals", ["four", "4"], ["4", "Four"], ["44"]),
        ("equals", 4, ["4"], ["4.0"]),
        ("contains", "Paris", ["It is paris!"], ["Rome"]),
        ("contains", ["a", "b"], ["xbx"], ["xyz"]),
        ("regex", r"^\d+$", ["42"], ["42!", "x"]),
        (
            "json",
            {"a": [1, 2.0]},
            ['{"a": [1, 2]}', '```json\n{"a":[1.0,2]}\n```'],
            ['{"a": [2, 1]}', "{", '{"a":[1,2]} x'],
        ),
        ("json", 1, ["1"], ["true"]),
        ("json", None, ["null"], ["", "NaN"]),
    ],
)
def test_check_accepts_right_and_rejects_wrong_answers(kind, value, right, wrong):
    assert all(passes(kind, value, text) for text in right)
    assert not any(passes(kind, value, text) for text in wrong)


def test_deeply_nested_json_answer_fails_without_an_exception():
    assert parse_json("[" * 100_000) == (False, None)


def test_json_schema_check_needs_its_package():
    schema = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    try:
        import jsonschema  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r'pip install "halfbyte\[evaluate\]"'):
            parse_check({"json_schema": schema}, "t, line 1", {})
        return
    check = parse_check({"json_schema": schema}, "t, line 1", {})
    assert check.passes('{"name": "Ada"}', {}, {})
    assert not check.passes('{"name": 3}', {}, {})
    with pytest.raises(ConfigError, match="line 1: the JSON schema is invalid"):
        parse_check({"json_schema": {"type": "obj"}}, "t, line 1", {})


def test_functions_are_loaded_from_the_users_file(tmp_path):
    path = tmp_path / "checks.py"
    path.write_text("def even(text, line):\n    return int(text) % line['by'] == 0\n")
    functions = load_functions(path)
    check = parse_check({"python": "even"}, "t, line 1", functions)
    assert check.passes("4", {"by": 2}, functions)
    assert not check.passes("5", {"by": 2}, functions)
    assert load_functions(None) == {}


def test_check_file_may_define_dataclasses(tmp_path):
    path = tmp_path / "checks.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Found:\n    text: str\n"
        "def right(text, line):\n    return Found(text).text == 'x'\n"
    )
    assert load_functions(path)["right"]("x", {}) is True


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ({"python": "odd"}, "no check function 'odd'; loaded are: even.*--checks"),
        ({"looks_like": "x"}, "equals, contains, regex"),
        ({"equals": "x", "regex": "y"}, "must be an object with one of"),
        ("x", "must be an object with one of"),
        ({"regex": "("}, "is invalid"),
        ({"python": ["even"]}, r"no check function \['even'\]"),
        ({"contains": []}, r"contains is \[\], which cannot be compared"),
        ({"contains": ["a", ""]}, "contains is an empty string"),
        ({"equals": [None]}, r"equals is \[null\]"),
    ],
)
def test_invalid_check_is_rejected_with_file_and_line(value, part):
    with pytest.raises(ConfigError, match=f"tasks.jsonl, line 7.*{part}"):
        parse_check(value, "tasks.jsonl, line 7", {"even": lambda text, line: True})


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "not a Python file"),
        ("1/0", "division by zero"),
        ("import sys; sys.exit(0)", r"SystemExit\(0\).*__main__"),
    ],
)
def test_check_file_that_cannot_be_imported_is_named(tmp_path, content, part):
    path = tmp_path / "checks.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=f"checks.py.*{part}"):
        load_functions(path)
