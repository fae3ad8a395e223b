from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.conversions import ATTENTION, MLP, write_source
from tests.helpers.tiny_gptq import TinyLinear

from halfbyte.cli import convert as verb
from halfbyte.cli.main import main
from halfbyte.convert.dense import DTYPES
from halfbyte.convert.gguf_plan import EMBEDDING_TYPES
from halfbyte.convert.run import FORMATS


@pytest.fixture
def model(tmp_path):
    linears = {f"{ATTENTION}.q_proj": TinyLinear(out_features=64), f"{MLP}.up_proj": TinyLinear()}
    write_source(tmp_path / "model", linears)
    return tmp_path / "model"


def test_choices_are_those_of_the_conversion():
    assert verb.FORMATS == FORMATS
    assert verb.TYPES == EMBEDDING_TYPES
    assert tuple(DTYPES) == verb.DTYPES


@pytest.mark.parametrize("to", FORMATS)
def test_every_format_is_written(model, tmp_path, capsys, to):
    assert main(["convert", str(model), "--to", to, "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "2 linears" in out
    assert ("Exact: every weight" in out) == (to != "hf")


def test_json_says_what_was_done(model, tmp_path, capsys):
    arguments = ["convert", str(model), "--to", "gguf", "-o", str(tmp_path / "x.gguf"), "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["is_exact"]
    assert report["holds"] == {"Q4_0": 2}
    assert report["num_bytes"] == (tmp_path / "x.gguf").stat().st_size
    assert "q8_0 not possible (rows of 4)" in report["notes"][-1]


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, capsys):
    write_source(tmp_path / "model", {f"{MLP}.up_proj": TinyLinear(symmetric=False)})
    arguments = ["convert", str(tmp_path / "model"), "--to", "gguf", "-o", str(tmp_path / "x.gguf")]
    assert main(arguments) == 2
    assert "cannot represent 1 of 1 linears" in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists()
    assert main([*arguments, "--allow-error"]) == 0
    assert "Not exact: 1 tensor was rounded" in capsys.readouterr().out


def test_a_folder_with_files_is_not_written_into(model, tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    assert main(["convert", str(model), "--to", "awq", "-o", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["", "out", "x.gguf"])
def test_a_models_own_folder_stays_unchanged(model, capsys, output):
    before = sorted(model.iterdir())
    assert main(["convert", str(model), "--to", "gguf", "-o", str(model / output)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{model / output} is inside the model's own folder {model}" in said
    assert sorted(model.iterdir()) == before


def test_embeddings_that_do_not_fit_the_type_are_refused(model, tmp_path, capsys):
    arguments = ["convert", str(model), "--to", "gguf", "-o", str(tmp_path / "x.gguf")]
    assert main([*arguments, "--embeddings", "q8_0"]) == 2
    assert "rows of 4 are not a multiple of 32" in capsys.readouterr().err


@pytest.mark.parametrize("is_tied", [True, False])
def test_types_of_embeddings_and_head_are_applied_and_reported(tmp_path, capsys, is_tied):
    gguf = pytest.importorskip("gguf")
    source, output = tmp_path / "model", tmp_path / "x.gguf"
    write_source(source, {f"{ATTENTION}.q_proj": TinyLinear(out_features=64)})
    tensors = load_file(source / "model.safetensors")
    values = torch.randn(260, 256, generator=torch.Generator().manual_seed(0))
    tensors["model.embed_tokens.weight"] = values
    if not is_tied:
        tensors["lm_head.weight"] = values.clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": is_tied}))
    choice = ["--embeddings", "q8_0", "--head", "q6_k"]
    assert main(["convert", str(source), "--to", "gguf", "-o", str(output), *choice]) == 0
    said = " ".join(capsys.readouterr().out.split())
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(output).tensors}
    held = found["token_embd.weight"]
    assert held.tensor_type.name == "Q8_0"
    again = gguf.dequantize(held.data, held.tensor_type)
    error = np.linalg.norm(again - values.numpy()) / values.norm()
    assert "token_embd is Q8_0, 0.1 MB; as f16 0.1 MB with an error of 0.0" in said
    assert f"q8_0 0.1 MB with an error of {error:.1%}"[:-2] in said
    assert ("--head q6_k has no effect" in said) == is_tied
    assert ("output.weight" in found) != is_tied
    if not is_tied:
        assert found["output.weight"].tensor_type.name == "Q6_K"


def test_a_model_in_full_precision_is_refused(tmp_path, capsys):
    from tests.helpers.families import write_family

    write_family(tmp_path / "model", "llama")
    arguments = ["convert", str(tmp_path / "model"), "--to", "awq", "-o", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "no quantized linear" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["--widen"], ["--head", "q8_0"], ["--embeddings", "f16"], ["--pre-tokenizer", "llama-bpe"]],
)
def test_gguf_options_are_refused_for_other_formats(model, tmp_path, capsys, words):
    assert main(["convert", str(model), "--to", "awq", "-o", str(tmp_path / "out"), *words]) == 2
    name = words[0].removeprefix("--").replace("-", "_")
    assert f"{name} has no effect for the format awq" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_base_beside_a_folder_is_refused(model, tmp_path, capsys):
    words = ["--to", "awq", "-o", str(tmp_path / "out"), "--base", str(model)]
    assert main(["convert", str(model), *words]) == 2
    assert "only a .gguf file needs one" in capsys.readouterr().err
