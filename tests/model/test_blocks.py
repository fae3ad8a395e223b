"""Finding blocks by structure, and shared inputs by running a block."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.families import build_family, token_lists
from torch import nn
from transformers import AutoConfig, Gemma3Config
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import ModelError
from halfbyte.model.blocks import (
    Stage,
    build_skeleton,
    find_blocks,
    find_stages,
    linear_weight,
    quantizable_linears,
    set_linear_weight,
)
from halfbyte.model.experts import unfuse_experts
from halfbyte.model.stream import BlockStream


@torch.no_grad()
def stages_of(family: str, block: int = 1) -> list[Stage]:
    model = build_family(family)
    unfuse_experts(model)
    blocks = find_blocks(model)
    stream = BlockStream(model, blocks, torch.float32)
    ids = torch.tensor(token_lists(2, 8))
    hidden = torch.randn(2, 8, 64)

    with stream.at(block):
        return find_stages(blocks.modules[block], lambda: stream.run(ids, hidden))


def names(stages: list[Stage]) -> list[list[tuple[str, ...]]]:
    return [[group.linears for group in stage.groups] for stage in stages]


@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        ("llama", "model.layers"),
        ("gpt2", "transformer.h"),
        ("opt", "model.decoder.layers"),
        ("mixtral", "model.layers"),
        ("gpt_neox", "gpt_neox.layers"),
        ("modernbert-decoder", "model.layers"),  # calls its head "decoder"
    ],
)
def test_blocks_are_the_longest_list(family: str, prefix: str) -> None:
    blocks = find_blocks(build_family(family))
    assert blocks.prefix == prefix
    assert len(blocks.modules) == 3
    assert blocks.name(2) == f"{prefix}.2"


def test_tower_of_more_modules_inside_the_decoder_is_not_taken() -> None:
    vision = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
    audio = {"num_blocks": 5, "hidden_size": 64, "num_attention_heads": 4}
    model = build_family(
        "phi4_multimodal",
        num_key_value_heads=2,
        vision_config={**vision, "intermediate_size": 96},
        audio_config={**audio, "intermediate_size": 96},
    )
    blocks = find_blocks(model)
    assert (blocks.prefix, len(blocks.modules)) == ("model.layers", 3)


@pytest.mark.parametrize(
    ("family", "changes", "name", "linear"),
    [
        ("llama4_text", {}, "feed_forward.router", False),
        ("deepseek_v4", {}, "self_attn.o_a_proj", False),
        ("falcon", {}, "self_attention.dense", True),
        ("gpt2", {}, "attn.c_proj", True),
    ],
)
def test_subclass_that_computes_something_else_is_no_linear(
    family: str, changes: dict[str, int], name: str, linear: bool
) -> None:
    block = find_blocks(build_family(family, **changes)).modules[0]
    assert isinstance(block.get_submodule(name), nn.Linear | Conv1D)
    assert (name in quantizable_linears(block)) == linear


def test_single_block_with_an_inner_list_is_found() -> None:
    blocks = find_blocks(build_family("mixtral", num_hidden_layers=1))
    assert blocks.prefix == "model.layers"


def test_blocks_are_found_if_linears_have_no_parameters() -> None:
    # OLMo's norms have no weights either.
    model = build_family("olmo")
    for name, linear in quantizable_linears(find_blocks(model).modules[0]).items():
        assert isinstance(linear, nn.Linear)
        for block in find_blocks(model).modules:
            block.set_submodule(name, nn.Module())
    assert find_blocks(model).prefix == "model.layers"
    assert not sum(p.numel() for p in model.model.layers.parameters())


def test_blocks_of_the_text_decoder_are_found_beside_a_larger_vision_tower() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    text = {**sizes, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 128}
    config = Gemma3Config(
        text_config={**text, "head_dim": 16},
        vision_config={**sizes, "num_hidden_layers": 8, "image_size": 28, "patch_size": 14},
    )
    blocks = find_blocks(build_skeleton(config, torch.float32))
    assert blocks.prefix == "model.language_model.layers"
    assert len(blocks.modules) == 2


def test_model_without_a_list_is_refused() -> None:
    with pytest.raises(ModelError, match="decoder blocks of Sequential: it has no list"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_configuration_of_another_kind_of_model_is_refused() -> None:
    config = AutoConfig.for_model("vit")
    with pytest.raises(ModelError, match=r"cannot build a causal language model of type 'vit'"):
        build_skeleton(config, torch.float32)


def test_skeleton_holds_buffers_but_no_parameters() -> None:
    config = build_family("llama").config
    model = build_skeleton(config, torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    buffers = list(model.buffers())
    assert buffers
    assert not any(b.is_meta for b in buffers)
    assert not model.training


def test_qkv_share_an_input_and_so_do_gate_and_up() -> None:
    assert names(stages_of("llama")) == [
        [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")],
        [("self_attn.o_proj",)],
        [("mlp.gate_proj", "mlp.up_proj")],
        [("mlp.down_proj",)],
    ]


def test_parallel_attention_and_feed_forward_have_separate_inputs() -> None:
    """GPT-NeoX runs both on the block's input, behind two norms."""
    assert names(stages_of("gpt_neox")) == [
        [("attention.query_key_value",)],
        [("attention.dense",)],
        [("mlp.dense_h_to_4h",)],
        [("mlp.dense_4h_to_h",)],
    ]


def test_falcon_shares_one_input_between_attention_and_feed_forward() -> None:
    first = names(stages_of("falcon"))[0]
    assert first == [("self_attention.query_key_value", "mlp.dense_h_to_4h")]


def test_conv1d_counts_as_a_linear() -> None:
    assert names(stages_of("gpt2")) == [
        [("attn.c_attn",)],
        [("attn.c_proj",)],
        [("mlp.c_fc",)],
        [("mlp.c_proj",)],
    ]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_stage_of_experts_has_one_group_each(family: str) -> None:
    stages = stages_of(family)
    experts = [stage for stage in stages if stage.experts is not None]
    assert [stage.experts_stage for stage in experts] == ["first", "second"]
    first, second = names(experts)
    assert len(first) == len(second) == 4
    assert {len(group) for group in first} == {2}
    assert {len(group) for group in second} == {1}
    prefix = f"{experts[0].experts}.2."
    assert all(name.startswith(prefix) for name in (*first[2], *second[2]))


@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v2", "gpt2", "falcon", "bloom"])
def test_every_linear_is_in_exactly_one_stage(family: str) -> None:
    model = build_family(family)
    unfuse_experts(model)
    expected = sorted(quantizable_linears(find_blocks(model).modules[1]))
    found = [n for stage in names(stages_of(family)) for group in stage for n in group]
    assert sorted(found) == expected


def test_linear_that_did_not_run_gets_the_first_stage() -> None:
    block = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})

    stages = find_stages(block, lambda: block["used"](torch.ones(3, 4)))
    assert names(stages) == [[("unused",)], [("used",)]]


def test_equal_values_in_two_tensors_are_not_a_shared_input() -> None:
    block = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    x = torch.ones(3, 4)

    def run() -> None:
        block["a"](x)
        block["b"](x.clone())
        x.add_(1)
        block["c"](x)

    assert names(find_stages(block, run)) == [[("a",)], [("b",)], [("c",)]]


def test_stages_are_in_execution_order_even_if_a_linear_runs_twice() -> None:
    block = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    x, y, z = torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 4)

    def run() -> None:
        for name, tensor in (("a", x), ("a", y), ("b", z), ("c", y)):
            block[name](tensor)

    assert names(find_stages(block, run)) == [[("a",)], [("b",)], [("c",)]]


@pytest.mark.parametrize("linear", [nn.Linear(6, 4), Conv1D(4, 6)], ids=["Linear", "Conv1D"])
def test_set_weight_and_get_weight_use_the_same_orientation(linear: nn.Module) -> None:
    weight = torch.randn(4, 6)
    set_linear_weight(linear, weight)
    assert torch.equal(linear_weight(linear), weight)
    x = torch.randn(2, 6)
    torch.testing.assert_close(linear(x), x @ weight.t() + linear.bias)


def test_set_weight_keeps_the_modules_dtype() -> None:
    linear = nn.Linear(6, 4, dtype=torch.bfloat16)
    set_linear_weight(linear, torch.randn(4, 6))
    assert linear.weight.dtype == torch.bfloat16
    assert not linear.weight.requires_grad
