"""bench on tiny models that are really loaded, each in a process of its own."""

from __future__ import annotations

import json

import pytest
from tests.helpers.checkpoints import build_model, tiny_llama_config, write_checkpoint
from tests.helpers.tiny_llama import build_tokenizer

from halfbyte.cli.main import main

SMALL = ["--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base, packed = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("packed")
    # The built-in text is all unknown words, 0, which must not be the padding, of zeros.
    config = tiny_llama_config(tie_word_embeddings=False, initializer_range=0.5, pad_token_id=1)
    build_model(config).save_pretrained(base)
    write_checkpoint(packed, config)
    return base, packed


def test_table_shows_the_base_first_and_how_many_times_faster(folders, capsys):
    base, packed = map(str, folders)
    assert main(["bench", packed, "--base", base, *SMALL]) == 0
    out, err = capsys.readouterr()
    assert out.index("1.00") < out.index("Prompts of 8 tokens, batch 1")
    assert f"{base}: no compiled decoder: q_proj does not run on cpu_native." in out
    assert err.index(base) < err.index(packed)


@pytest.mark.native
def test_error_of_int8_activations_is_measured(folders, capsys):
    base, packed = map(str, folders)
    build_tokenizer().save_pretrained(packed)
    options = ["--activations", "int8", *SMALL]
    assert main(["bench", packed, "--base", base, *options]) == 0
    out = capsys.readouterr().out
    assert f"{packed}: with int8 activations the KL divergence is 0.0" in out
    assert f"{base}: with int8 activations" not in out
    assert main(["bench", packed, "--json", *options]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert 0 < models[packed]["rounding"]["kl_nats"] < 0.05


def test_json_has_every_quantity(folders, capsys):
    assert main(["bench", str(folders[1]), "--json", *SMALL]) == 0
    values = json.loads(capsys.readouterr().out)
    (result,) = values["models"].values()
    assert result["prompt_tokens"] == 8
    assert result["rate"] > 0
    assert values["shares"].keys() == values["models"].keys()
