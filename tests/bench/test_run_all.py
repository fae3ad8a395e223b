from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def runs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("run_all").RUNS


def count_required(script: Path) -> int:
    """Count the required arguments of a script."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    options = [
        c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "add_argument"
    ]
    required = 0
    for call in options:
        first = ast.literal_eval(call.args[0])
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        optional = keywords.get("nargs") in ("'?'", "'*'")
        required += "required" in keywords if first.startswith("-") else not optional
    return required


def test_every_script_gets_its_required_arguments(runs):
    for name, arguments in runs.items():
        positional = [argument for argument in arguments if not argument.startswith("-")]
        assert len(positional) >= count_required(BENCH / f"{name}.py"), name
