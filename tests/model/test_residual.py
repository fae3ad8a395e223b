"""Finding the readers and writers of the residual stream."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.families import build_family

from halfbyte.model.blocks import find_blocks
from halfbyte.model.experts import unfuse_experts
from halfbyte.model.residual import find_roles

ATTENTION = {"input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]}
IDS = torch.arange(1, 9)[None]


def roles_of(family: str):
    model = build_family(family)
    unfuse_experts(model)
    block = find_blocks(model).modules[1]
    return find_roles(block, 64, lambda: model(IDS), lambda name: True)[1]


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_dense_block(family):
    roles = roles_of(family)
    mlp = {"post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"]}
    assert roles.readers == ATTENTION | mlp
    assert roles.writers == ["self_attn.o_proj", "mlp.down_proj"]
    assert not roles.routed


def test_fused_projections():
    roles = roles_of("phi3")
    assert roles.readers == {
        "input_layernorm": ["self_attn.qkv_proj"],
        "post_attention_layernorm": ["mlp.gate_up_proj"],
    }


def test_experts_and_their_router_read_what_the_norm_gives():
    roles = roles_of("mixtral")
    readers = roles.readers["post_attention_layernorm"]
    assert readers[0] == "mlp.gate"
    assert len(readers) == 1 + 4 * 2
    assert [n for n in roles.writers if ".experts." in n] == [
        f"mlp.experts.{expert}.w2" for expert in range(4)
    ]
    assert roles.routed


def test_norms_after_linears_have_no_readers():
    assert roles_of("olmo2").readers == {}


def test_only_included_modules_are_considered():
    model = build_family("llama")
    prefix = f"{find_blocks(model).prefix}."
    output, roles = find_roles(
        model, 64, lambda: model(IDS).logits, lambda name: not name.startswith(prefix)
    )
    assert output.shape == (1, 8, 128)
    assert roles.readers == {"model.norm": ["lm_head"]}
    assert roles.writers == []
