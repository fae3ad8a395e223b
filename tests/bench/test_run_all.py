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


def list_needed(script: Path) -> int:
    """Count the arguments without which a script does not start."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    asked = [
        c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "add_argument"
    ]
    needed = 0
    for call in asked:
        first = ast.literal_eval(call.args[0])
        options = {k.arg: ast.unparse(k.value) for k in call.keywords}
        optional = options.get("nargs") in ("'?'", "'*'")
        needed += "required" in options if first.startswith("-") else not optional
    return needed


def test_every_script_gets_what_it_needs(runs):
    for name, arguments in runs.items():
        positional = [argument for argument in arguments if not argument.startswith("-")]
        assert len(positional) >= list_needed(BENCH / f"{name}.py"), name
