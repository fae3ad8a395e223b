"""Rotating the residual stream: the model computes the same, or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.helpers.families import FAMILIES, build_family, token_lists
from torch import Tensor
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte.cli.main import main
from halfbyte.errors import CheckpointError, ConfigError, ModelError
from halfbyte.quant_config import CalibrationConfig, QuantConfig
from halfbyte.quantize import rotate as rotating
from halfbyte.quantize.rotate import ROTATION_FILE, rotate
from halfbyte.quantize.rotation import Rotation

ROTATABLE = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3", "seed_oss", "granite"),
    *("mixtral", "qwen2_moe", "olmoe", "qwen3_moe", "deepseek_v2", "deepseek_v3"),
}
IDS = torch.tensor(token_lists(2, 24, seed=2))


def write_uneven(folder: Path, family: str, **changes):
    """A model whose gains are not all alike, and whose blocks decide what it predicts."""
    model = build_family(family, **changes)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
        else:
            parameter.data.mul_(5)
    model.save_pretrained(folder, max_shard_size="200KB")


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


def dense(rotation: Rotation) -> Tensor:
    """The matrix in float64, put together from its definition."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for factor in rotation.factors:
        matrix = torch.kron(matrix, factor.double())
    return rotation.signs.double()[:, None] * matrix


@pytest.mark.parametrize("width", [1, 7, 64, 96, 128, 576, 4096])
def test_rotation_is_orthogonal_and_equals_its_matrix(width):
    rotation = Rotation.random(width, 3)
    matrix = dense(rotation)
    torch.testing.assert_close(
        matrix @ matrix.t(), torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-6
    )
    vectors = torch.randn(2, 3, width)
    expected = (vectors.double() @ matrix).float()
    torch.testing.assert_close(rotation.rotate(vectors), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [96, 128])
def test_reader_and_writer_undo_each_other(width):
    rotation = Rotation.random(width, 0)
    x, gains = torch.randn(5, 20), torch.rand(width) + 0.5
    writer, reader = torch.randn(width, 20), torch.randn(11, width)
    turned = (x @ rotation.rotate_writer(writer).t()) @ rotation.rotate_reader(reader, gains).t()
    expected = ((x @ writer.t()) * gains) @ reader.t()
    torch.testing.assert_close(turned, expected, rtol=1e-4, atol=1e-3)


def test_seed_determines_the_rotation():
    same, again, other = (Rotation.random(96, seed).rotate(torch.eye(96)) for seed in (1, 1, 2))
    assert torch.equal(same, again)
    assert not torch.allclose(same, other, atol=0.1)


def test_huge_channels_are_spread():
    x = torch.randn(16, 576)
    x[:, 5] = 300.0
    turned = Rotation.random(576, 0).rotate(x)
    assert float(turned.abs().max()) < float(x.abs().max()) / 4
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_rotated_model_computes_the_same_or_is_refused(family, tmp_path):
    write_uneven(tmp_path / "base", family)
    if family not in ROTATABLE:
        with pytest.raises(ModelError, match=r"Cannot rotate the residual stream of .*base: .*"):
            rotate(tmp_path / "base", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    report = rotate(tmp_path / "base", tmp_path / "out")
    before, after = logits(tmp_path / "base"), logits(tmp_path / "out")
    torch.testing.assert_close(after, before, rtol=1e-4, atol=5e-5)
    assert float(before.std()) > 0.1, "a model that predicts nothing would agree, too"
    assert report.largest_error < 1e-4
    plain, turned = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("base", "out")
    )
    stream = [n for n, w in plain.items() if w.dim() == 2 and 64 in w.shape]
    assert [n for n in stream if torch.allclose(plain[n], turned[n])] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_stored_in_16_bits_can_be_rotated(tmp_path, dtype):
    build_family("llama", tie_word_embeddings=True).to(dtype).save_pretrained(tmp_path / "base")
    rotate(tmp_path / "base", tmp_path / "turned")
    expected, found = logits(tmp_path / "base"), logits(tmp_path / "turned")
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_tied_head_is_untied(tmp_path):
    write_uneven(tmp_path / "base", "llama", tie_word_embeddings=True)
    report = rotate(tmp_path / "base", tmp_path / "out")
    assert report.untied_bytes == 128 * 64 * 4
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(
        logits(tmp_path / "out"), logits(tmp_path / "base"), rtol=1e-4, atol=5e-5
    )


def test_embedding_of_zero_stays_zero(tmp_path):
    write_uneven(tmp_path / "base", "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.model.embed_tokens.weight.data[::2] = 0
    model.save_pretrained(tmp_path / "base")
    assert rotate(tmp_path / "base", tmp_path / "out").largest_error < 1e-4


def test_biases_of_writers_are_rotated(tmp_path):
    write_uneven(tmp_path / "base", "llama", attention_bias=True, mlp_bias=True)
    rotate(tmp_path / "base", tmp_path / "out")
    torch.testing.assert_close(
        logits(tmp_path / "out"), logits(tmp_path / "base"), rtol=1e-4, atol=5e-5
    )


def test_same_seed_gives_the_same_files_with_a_report(tmp_path):
    write_uneven(tmp_path / "base", "qwen2")
    reports = [rotate(tmp_path / "base", tmp_path / name, seed=4) for name in ("a", "b")]
    shards = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(shards) == 4
    for name in shards:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    told = json.loads((tmp_path / "a" / ROTATION_FILE).read_text())
    assert told == reports[0].to_dict()
    assert told["seed"] == 4
    rotate(tmp_path / "base", tmp_path / "other", seed=5)
    assert (tmp_path / "other" / shards[0]).read_bytes() != (
        tmp_path / "a" / shards[0]
    ).read_bytes()


def test_rotated_model_can_be_quantized_and_loaded(tmp_path):
    write_uneven(tmp_path / "base", "llama", tie_word_embeddings=True)
    rotate(tmp_path / "base", tmp_path / "turned")
    halfbyte.quantize(
        tmp_path / "turned",
        tmp_path / "out",
        config=QuantConfig(bits=8, group_size=32),
        calibration=CalibrationConfig(samples=8, length=48, batch_size=4),
        text=token_lists(),
    )
    before, after = logits(tmp_path / "base"), logits(tmp_path / "out")
    assert float((after - before).norm() / before.norm()) < 0.05
    assert (tmp_path / "out" / ROTATION_FILE).is_file()


def test_folder_in_use_is_refused_and_unchanged(tmp_path):
    write_uneven(tmp_path / "base", "llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        rotate(tmp_path / "base", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"base/out is inside the model's own folder .*base"):
        rotate(tmp_path / "base", tmp_path / "base/out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_nothing_remains_after_an_error_at_the_end(tmp_path, monkeypatch):
    write_uneven(tmp_path / "base", "llama")
    templates = tmp_path / "base" / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("")

    def fail(path, content):
        assert (tmp_path / "out" / templates.name).is_dir(), "they are copied before"
        raise CheckpointError(f"Cannot write {path}: the disk is full.")

    monkeypatch.setattr(rotating, "write_json", fail)
    with pytest.raises(CheckpointError, match=r"rotation\.json: the disk is full"):
        rotate(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_reports_what_it_wrote(tmp_path, capsys):
    write_uneven(tmp_path / "base", "llama", tie_word_embeddings=True)
    assert main(["rotate", str(tmp_path / "base"), "-o", str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "3 blocks" in said
    assert "the head is no longer tied to the embeddings" in said
    assert main(["rotate", str(tmp_path / "base"), "-o", str(tmp_path / "o2"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["width"] == 64


@pytest.mark.parametrize("method", ["rotate_writer", "rotate_reader", "rotate"])
def test_block_that_computes_something_else_is_refused(tmp_path, monkeypatch, method):
    write_uneven(tmp_path / "base", "llama")
    right = getattr(Rotation, method)
    monkeypatch.setattr(Rotation, method, lambda *args: right(*args) * 1.01 + 0.01)
    with pytest.raises(
        ModelError, match=r"the outputs of model\.layers\.0 change by .* allowed is 0\.001"
    ):
        rotate(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("number", "part"), [(0, "its head"), (1, "its embedding")])
def test_head_and_embedding_are_checked(tmp_path, monkeypatch, number, part):
    write_uneven(tmp_path / "base", "llama")
    right, calls = rotating._map_rows, []

    def wrong(weight, turn):
        calls.append(weight)
        turned = right(weight, turn)
        return turned.roll(1, 1) if len(calls) == number + 1 else turned

    monkeypatch.setattr(rotating, "_map_rows", wrong)
    with pytest.raises(ModelError, match=f"the outputs of {part} change by"):
        rotate(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
