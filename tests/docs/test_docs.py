"""The documentation says what is so: links, commands, code, file names, layers."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from halfbyte.cli.main import build_parser, join_verb

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def halfbyte_commands() -> list[tuple[str, str]]:
    return [
        (line.removeprefix("halfbyte "), f"{page.relative_to(ROOT)}")
        for page in PAGES
        for block in code_blocks(page, "")
        for line in block.splitlines()
        if line.startswith("halfbyte ")
    ]


def python_snippets() -> list[tuple[str, str]]:
    return [(b, str(page.relative_to(ROOT))) for page in PAGES for b in code_blocks(page, "python")]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_pages_hold_commands_and_snippets():
    assert len(halfbyte_commands()) >= 8
    assert len(python_snippets()) >= 3


@pytest.mark.parametrize(("command", "page"), halfbyte_commands())
def test_command_is_one_that_the_parser_takes(command, page):
    words = join_verb(shlex.split(command, comments=True))
    args = build_parser((words[0],)).parse_args(words)
    assert args.verb == words[0]


@pytest.mark.parametrize(("snippet", "page"), python_snippets())
def test_snippet_compiles_and_imports_what_exists(snippet, page):
    for node in ast.walk(ast.parse(snippet)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert [a.name for a in node.names if not hasattr(module, a.name)] == []


def test_generated_pages_are_what_the_code_says(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    monkeypatch.setattr("sys.argv", ["generate.py", "--check"])
    assert generate.main() == 0, capsys.readouterr().err


def test_structure_names_files_that_exist():
    text = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    source = ROOT / "src" / "halfbyte"
    names = re.findall(r"`([\w/]+(?:\.py|/))`", text)
    places = [ROOT, source, source / "quantize", source / "checkpoint"]
    assert len(names) > 20
    assert [n for n in names if not any((place / n).exists() for place in places)] == []


def test_structure_shows_the_layers_that_are_enforced():
    text = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = config["tool"]["importlinter"]["contracts"][0]["layers"]
    enforced = [re.sub(r"[() ]", "", layer).replace("|", ",") for layer in layers]
    shown = re.search(r"```\n(cli >.*?)```", text, re.DOTALL)[1]
    assert [re.sub(r"\s", "", part) for part in shown.split(">")] == enforced[1:]
