"""generate and chat on a tiny quantized model that is really loaded."""

from __future__ import annotations

import io
import json

import pytest
from tests.helpers.checkpoints import Recipe, tiny_llama_config, write_checkpoint
from tests.helpers.tiny_llama import build_tokenizer

from halfbyte.cli.main import main

TEMPLATE = (
    "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    config = tiny_llama_config(initializer_range=0.5, vocab_size=64, eos_token_id=63)
    write_checkpoint(tmp_path, config, Recipe())
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def generate(capsys, *arguments):
    assert main(["generate", *map(str, arguments), "--max-new-tokens", "6"]) == 0
    return capsys.readouterr()


def test_streams_text_and_says_how_fast(folder, capsys):
    out, err = generate(capsys, folder, "--prompt", "w1 w2")
    assert out.endswith("\n")
    assert out.strip()
    assert "2 prompt tokens at" in err
    assert "generated at" in err


def test_json_has_text_tokens_and_speed(folder, capsys):
    text = generate(capsys, folder, "--prompt", "w1 w2")[0].strip()
    values = json.loads(generate(capsys, folder, "--prompt", "w1 w2", "--json")[0])
    assert values["text"].strip() == text
    assert values["prompt_tokens"] == 2
    assert 0 < len(values["tokens"]) <= 6
    assert values["compiled_decoder"] == (values["why_not"] is None)
    assert values["first_token_seconds"] > 0


def test_prompt_comes_from_stdin(folder, capsys, monkeypatch):
    expected = generate(capsys, folder, "--prompt", "w1 w2")[0]
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2"))
    assert generate(capsys, folder, "--prompt", "-")[0] == expected


def test_answer_goes_through_the_chat_template(folder, capsys):
    values = json.loads(generate(capsys, folder, "--prompt", "w1", "--answer", "--json")[0])
    plain = json.loads(generate(capsys, folder, "--prompt", "w1 w9", "--json")[0])
    assert values["tokens"] == plain["tokens"]
    assert values["prompt_tokens"] == 2


def test_chat_answers_each_line_until_the_input_ends(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w1\n\nw2\n/new\nw1\n"))
    arguments = ["--temperature", "0", "--max-new-tokens", "6"]
    assert main(["chat", str(folder), *arguments]) == 0
    out, err = capsys.readouterr()
    answers = out.splitlines()
    assert len(answers) == 3
    assert answers[0] == answers[2]
    assert err.count("prompt tokens at") == 3
    assert "/exit" in err


def test_chat_starts_with_the_system_text(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w1\n/exit\nw2\n"))
    assert main(["chat", str(folder), "--system", "w5 w6", "--max-new-tokens", "2"]) == 0
    assert "4 prompt tokens at" in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "is no model folder: it has no config.json" in capsys.readouterr().err
