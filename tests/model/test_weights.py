"""Loading weights block by block; wrong files are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.families import build_family, write_family
from torch import nn

from halfbyte.errors import CheckpointError, ModelError
from halfbyte.model.weights import ModelWeights, load_model_config
from halfbyte.quantize.block_work import cast_block, split_experts

CPU = torch.device("cpu")


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite the folder as one shard; None drops a tensor (underscores are dots)."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    for name, tensor in changes.items():
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bloom"])
def test_loaded_block_has_the_models_weights(family: str, tmp_path: Path) -> None:
    base = write_family(tmp_path, family)
    weights = ModelWeights(tmp_path, CPU)
    block = weights.load_block(1)
    expected = base.get_submodule(weights.blocks.name(1)).state_dict()
    assert block.state_dict().keys() == expected.keys()
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_other_blocks_are_not_in_memory(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    weights = ModelWeights(tmp_path, CPU)
    assert all(p.is_meta for p in weights.model.parameters())
    weights.load_block(1)
    for index, block in enumerate(weights.blocks.modules):
        assert all(p.is_meta == (index != 1) for p in block.parameters())


@pytest.mark.parametrize("family", ["llama", "mixtral", "bloom"])
def test_dropped_block_is_freed_and_can_be_reloaded(family: str, tmp_path: Path) -> None:
    write_family(tmp_path, family)
    weights = ModelWeights(tmp_path, CPU)
    first = {name: p.clone() for name, p in weights.load_block(0).named_parameters()}
    weights.drop_block(0)
    assert all(p.is_meta for p in weights.blocks.modules[0].parameters())
    again = dict(weights.load_block(0).named_parameters())
    assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "deepseek_v3"])
def test_block_that_was_cast_is_reloaded_as_stored(family: str, tmp_path: Path) -> None:
    build_family(family, num_hidden_layers=2).half().save_pretrained(tmp_path)
    weights = ModelWeights(tmp_path, CPU)
    block = weights.load_block(1)
    split_experts(weights, 1)
    first = {name: p.clone() for name, p in block.named_parameters()}
    cast_block(block, torch.float16, torch.bfloat16)
    weights.drop_block(1)
    again = dict(weights.load_block(1).named_parameters())
    assert {name: p.dtype for name, p in again.items()} == {n: p.dtype for n, p in first.items()}
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_weights_outside_the_blocks_are_mapped_and_tied(tmp_path: Path) -> None:
    base = write_family(tmp_path, "llama", tie_word_embeddings=True)
    weights = ModelWeights(tmp_path, CPU)
    weights.load_outside()
    embedding = weights.model.get_input_embeddings().weight
    assert weights.model.get_output_embeddings().weight is embedding
    assert torch.equal(embedding, base.get_input_embeddings().weight)
    info = weights.files.infos["model.embed_tokens.weight"]
    mapped = Path("/proc/self/maps")
    if mapped.is_file():
        assert str(info.file) in mapped.read_text(), "the embedding was read, not mapped"
    assert torch.equal(weights.model.model.norm.weight, base.model.norm.weight)


def test_changing_a_mapped_tensor_does_not_change_the_file(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    before = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    weights = ModelWeights(tmp_path, CPU)
    weights.load_outside()
    weights.model.get_input_embeddings().weight.data.zero_()
    assert all(path.read_bytes() == data for path, data in before.items())


def test_keys_are_sorted_into_blocks_and_outside(tmp_path: Path) -> None:
    write_family(tmp_path, "mixtral")
    weights = ModelWeights(tmp_path, CPU)
    assert sorted(weights.outside_keys) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]
    keys = weights.block_keys(2)
    assert all(key.startswith("model.layers.2.") for key in keys)
    assert len(keys) == 4 + 2 + 1 + 4 * 3
    without = weights.block_keys(2, ["model.layers.2.self_attn", "model.layers.2.mlp.experts"])
    assert len(without) == 3
    assert not any("experts" in key or "attn" in key for key in without)


def test_a_module_left_out_is_not_a_prefix_of_another(tmp_path: Path) -> None:
    write_family(tmp_path, "llama", num_hidden_layers=11)
    weights = ModelWeights(tmp_path, CPU)
    assert len(weights.block_keys(10, ["model.layers.1"])) == len(weights.block_keys(10))


def test_disk_names_are_those_of_the_files(tmp_path: Path) -> None:
    write_family(tmp_path, "mixtral")
    weights = ModelWeights(tmp_path, CPU)
    moe = "model.layers.0.block_sparse_moe.experts.1.w1"
    assert moe + ".weight" in weights.files.infos
    assert weights.disk_name("model.layers.0.mlp.experts.1.w1") == moe
    assert weights.disk_name("nowhere.at_all") == "nowhere.at_all"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_the_most_common_stored_one(dtype: torch.dtype, tmp_path: Path) -> None:
    base = write_family(tmp_path / "a", "llama").to(dtype)
    base.save_pretrained(tmp_path / "b")
    assert ModelWeights(tmp_path / "b", CPU).dtype == dtype


def test_missing_tensor_of_a_block_is_named(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    edit_tensors(tmp_path, **{"model.layers.1.mlp.up_proj.weight": None})
    weights = ModelWeights(tmp_path, CPU)
    weights.load_block(0)
    with pytest.raises(
        CheckpointError, match=r"is missing model\.layers\.1\.mlp\.up_proj\.weight; it has 29 "
    ):
        weights.load_block(1)


def test_missing_tensor_outside_the_blocks_is_named(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    edit_tensors(tmp_path, **{"model.norm.weight": None})
    with pytest.raises(CheckpointError, match=r"is missing model\.norm\.weight; it has 29 tensors"):
        ModelWeights(tmp_path, CPU).load_outside()


def test_missing_expert_is_named(tmp_path: Path) -> None:
    write_family(tmp_path, "mixtral")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    edit_tensors(tmp_path, **{name: None})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        ModelWeights(tmp_path, CPU).load_block(1)


def test_wrong_shape_is_named_with_both(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    edit_tensors(tmp_path, **{"model.layers.0.mlp.up_proj.weight": torch.zeros(90, 64)})
    with pytest.raises(
        CheckpointError,
        match=r"model\.layers\.0\.mlp\.up_proj\.weight in .* has shape \[90, 64\]; config\.json "
        r"asks for \[96, 64\]",
    ):
        ModelWeights(tmp_path, CPU).load_block(0)


def test_quantized_model_is_refused(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"is already quantized \(gptq\)\. Quantize the original"):
        ModelWeights(tmp_path, CPU)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    for path in tmp_path.glob("*.safetensors"):
        save_file({n: t.to(torch.int8) for n, t in load_file(path).items()}, path)
    with pytest.raises(ModelError, match=r"stored as torch\.int8; float32, bfloat16 or float16"):
        ModelWeights(tmp_path, CPU)


def test_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    for path in tmp_path.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        ModelWeights(tmp_path, CPU)


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        load_model_config(tmp_path)


@pytest.mark.parametrize(
    "text", ['{"model_type": "no_such_family"}', "{}", "{broken"], ids=["unknown", "none", "broken"]
)
def test_unusable_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"Cannot read the configuration in .*never run"):
        load_model_config(tmp_path)


def test_code_in_the_folder_is_never_run(tmp_path: Path) -> None:
    edit = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(edit))
    (tmp_path / "own.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(ModelError, match="a repository's code is never run"):
        load_model_config(tmp_path)


def test_unbuildable_blocks_name_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_family(tmp_path, "llama")
    monkeypatch.setattr(
        "halfbyte.model.weights.build_skeleton", lambda *_: nn.Sequential(nn.Linear(4, 4))
    )
    with pytest.raises(ModelError, match="Cannot find the decoder blocks of Sequential"):
        ModelWeights(tmp_path, CPU)


def test_blocks_that_share_weights_are_refused(tmp_path: Path) -> None:
    sizes = {
        "num_hidden_layers": 3,
        "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [0, 2],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_query_groups": 4,
        "n_mamba_heads": 4,
        "mamba_headdim": 32,
        "mamba_d_state": 16,
        "adapter_rank": 32,
    }
    write_family(tmp_path, "zamba2", **sizes)
    with pytest.raises(
        ModelError,
        match=r"Cannot stream model\.layers\.2 of .*: model\.layers\.2\.shared_transformer\..* is "
        r"tied to model\.layers\.0\.shared_transformer\..*whose blocks share weights cannot be",
    ):
        ModelWeights(tmp_path, CPU)
