"""generate and chat on a tiny quantized model that is really loaded."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from tests.helpers.checkpoints import Recipe, tiny_llama_config, write_checkpoint
from tests.helpers.tiny_llama import build_tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from halfbyte.cli.main import main
from halfbyte.integrations.generation import TextStream

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


def set_positions(folder, count):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": count}))


def rename_words(folder, form):
    """Call the tokenizer's words w0, w1, … otherwise."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    values["model"]["vocab"] = {
        re.sub(r"^w(?=\d)", form.format(""), w): i for w, i in vocabulary.items()
    }
    path.write_text(json.dumps(values))


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
    # As a pipe is: it takes no other settings once it is read from.
    monkeypatch.setattr("sys.stdin", text_of(b"w1\n\nw2\n/new\nw1\n"))
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


def text_of(content, encoding="utf-8"):
    return io.TextIOWrapper(io.BytesIO(content), encoding=encoding, write_through=True)


def test_characters_that_the_output_lacks_are_replaced(folder, monkeypatch):
    rename_words(folder, "é{}")
    out = text_of(b"", "ascii")
    monkeypatch.setattr("sys.stdout", out)
    assert main(["generate", str(folder), "--prompt", "é1 é2", "--max-new-tokens", "6"]) == 0
    assert re.fullmatch(rb"(\?[0-9]+ ?)+\n", out.buffer.getvalue())


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("generate", ["--prompt", "-"]),
        ("generate", ["--prompt", "w1 \udcff"]),
        ("chat", []),
        ("chat", ["--system", "w1 \udcff"]),
    ],
)
def test_invalid_bytes_are_reported(folder, capsys, monkeypatch, verb, options):
    monkeypatch.setattr("sys.stdin", text_of(b"w1 \xff w2\n"))
    assert main([verb, str(folder), *options]) == 2
    assert "is not utf-8: it has a byte 0xff after 3 characters" in capsys.readouterr().err


def test_error_of_a_template_is_reported(folder, capsys):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    tokenizer.save_pretrained(folder)
    assert main(["generate", str(folder), "--prompt", "w1", "--answer"]) == 2
    assert "rejects this conversation: roles must alternate." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--temperature", "nan"), "temperature is nan; it must be at least 0"),
        (("--temperature", "inf"), "temperature is inf; it must be"),
        (("--seed", str(2**64)), "seed is 18446744073709551616; it must be from -2**63 to"),
        (("--prompt", "w1 " * 70), "The prompt has 70 tokens; the model has 64 positions"),
    ],
)
def test_invalid_sampling_options_are_reported(folder, capsys, option, message):
    set_positions(folder, 64)
    assert main(["generate", str(folder), "--prompt", "w1", *option]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("temperature", ["1e-45", "1e-320"])
def test_tiny_temperature_is_greedy(folder, capsys, temperature):
    likeliest = generate(capsys, folder, "--prompt", "w1 w2")[0]
    drawn = generate(capsys, folder, "--prompt", "w1 w2", "--temperature", temperature)[0]
    assert drawn == likeliest


def test_text_ends_at_the_last_position_of_the_model(folder, capsys):
    set_positions(folder, 64)
    arguments = [str(folder), "--prompt", "w1 w2 w3", "--max-new-tokens", str(10**15), "--json"]
    assert main(["generate", *arguments]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    # One that is not run needs no position; or the text ended by itself.
    assert 0 < len(tokens) <= 64 - 3 + 1


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_buffered_text_is_flushed_at_the_end(folder, capsys, monkeypatch, verb):
    monkeypatch.setattr("sys.stdin", io.StringIO("w1\n"))
    monkeypatch.setattr(TextStream, "add", lambda *_: "")
    monkeypatch.setattr(TextStream, "finish", lambda _: "the rest")
    options = ["--prompt", "w1"] if verb == "generate" else []
    assert main([verb, str(folder), *options]) == 0
    assert capsys.readouterr().out == "the rest\n"


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "it has no config.json. Give a model folder" in capsys.readouterr().err


def test_an_unquantized_model_in_pickles_is_refused(tmp_path, capsys):
    model = LlamaForCausalLM(tiny_llama_config())
    model.config.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # Transformers would load it
    assert main(["generate", str(tmp_path), "--prompt", "w1"]) == 1
    assert "its weights are stored only as pickles (pytorch_model.bin)" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused(tmp_path, capsys):
    write_checkpoint(tmp_path, tiny_llama_config(num_hidden_layers=1))
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "it has no tokenizer. Copy the tokenizer files" in capsys.readouterr().err


def test_a_model_that_needs_another_package_is_refused_with_its_name(tmp_path, capsys):
    write_checkpoint(tmp_path, tiny_llama_config(num_hidden_layers=1))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 1
    assert (
        "through Transformers: Loading an AWQ quantized model requires" in capsys.readouterr().err
    )
