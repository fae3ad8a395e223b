"""Any causal LM: quantized, saved, loaded, and equal to the model with dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.families import (
    FAMILIES,
    VOCABULARY,
    build_family,
    token_lists,
    write_family,
)
from torch import nn
from transformers import AutoModelForCausalLM, MllamaConfig, MllamaForConditionalGeneration
from transformers.pytorch_utils import Conv1D

import halfbyte
from halfbyte.checkpoint.read import open_checkpoint
from halfbyte.errors import ModelError
from halfbyte.model.blocks import find_blocks, quantizable_linears, set_linear_weight
from halfbyte.model.experts import unfuse_experts
from halfbyte.model.naming import module_key_map
from halfbyte.quant_config import CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize.report import QuantizationReport

CALIBRATION = CalibrationConfig(samples=8, length=48, batch_size=4)


def _quantize(folder: Path, resources: ResourceConfig | None = None) -> QuantizationReport:
    return halfbyte.quantize(
        folder / "base",
        folder / "out",
        config=QuantConfig(group_size=32),
        calibration=CALIBRATION,
        text=token_lists(),
        resources=resources,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_model_computes_with_the_dequantized_weights(family: str, tmp_path: Path) -> None:
    base = write_family(tmp_path / "base", family)
    report = _quantize(tmp_path)
    ids = torch.tensor(token_lists(2, 24, seed=2))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    unfuse_experts(base)
    checkpoint = open_checkpoint(tmp_path / "out")
    names = module_key_map(base, [f"{name}.qweight" for name in checkpoint.linears])
    for key, name in names.items():
        linear = base.get_submodule(name.removesuffix(".qweight"))
        set_linear_weight(linear, checkpoint.dequantize(key.removesuffix(".qweight")))
    with torch.no_grad():
        expected, found = base(ids).logits, loaded(ids).logits
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    _assert_every_linear_is_accounted_for(base, report, names)
    assert quantizable_linears(loaded).keys() == quantizable_linears(base).keys()


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
@pytest.mark.parametrize(
    ("stored", "computing"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")],
)
def test_model_computes_in_another_dtype_than_stored(
    family: str, stored: str, computing: str, tmp_path: Path
) -> None:
    model = build_family(family, num_hidden_layers=1)
    model.to(getattr(torch, stored)).save_pretrained(tmp_path / "base")
    report = _quantize(tmp_path, ResourceConfig(dtype=computing))
    assert len(report.modules) >= 4


def test_block_that_needs_more_than_hidden_states_is_refused_after_the_first(
    tmp_path: Path,
) -> None:
    shared = {
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 2,
        "head_dim": 16,
        "global_head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 128,
    }
    write_family(tmp_path / "base", "gemma4_text", **shared)
    with pytest.raises(
        ModelError,
        match=r"Cannot stream model\.layers\.4: it does not run without the blocks before it "
        r"\(KeyError: 'sliding_attention'\)\. It may need more .* keys and values",
    ):
        _quantize(tmp_path)
    shards = [path.name for path in (tmp_path / "out").glob("*.safetensors")]
    assert "model-00002-of-00007.safetensors" not in shards


def test_block_that_takes_a_choice_of_tokens_from_another_is_refused(tmp_path: Path) -> None:
    shared = {
        "num_key_value_heads": 4,
        "head_dim": 32,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 32,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_layer_types": ["dense"] * 3,
        "layer_types": ["indexed_attention"] * 3,
        "index_head_dim": 32,
        "index_n_heads": 4,
        "index_topk": 8,
        "indexer_types": ["full", "full", "shared"],
    }
    write_family(tmp_path / "base", "hy_v4", **shared)
    with pytest.raises(
        ModelError,
        match=r"Cannot stream model\.layers\.2: it does not run without the blocks before it "
        r"\(ValueError: Shared DSA layers require top-k indices",
    ):
        _quantize(tmp_path)


def test_model_that_loops_over_its_blocks_is_refused_after_the_first(tmp_path: Path) -> None:
    looped = {"num_hidden_layers": 2, "H_cycles": 2, "L_cycles": 3}
    write_family(tmp_path / "base", "hrm_text", **looped)
    with pytest.raises(
        ModelError,
        match=r"model\.L_module\.layers: the model runs block 0 after blocks \[0, 1\], but every",
    ):
        _quantize(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("rwkv", {}, r"Cannot stream rwkv\.blocks: the model changes the weights of its blocks"),
        (
            "reformer",
            {
                "axial_pos_embds_dim": [16, 48],
                "axial_pos_shape": [16, 16],
                "is_decoder": True,
                "attn_layers": ["local", "local"],
                "local_attn_chunk_length": 8,
            },
            r"Cannot stream reformer\.encoder\.layers: the model does not run with hidden states "
            r"in place of its blocks' outputs \(AttributeError: 'tuple' object has no attribute",
        ),
        (
            "cpmant",
            {"dim_ff": 96, "dim_head": 16, "prompt_length": 8},
            r"Cannot stream cpmant\.encoder\.layers\.0: it gets states of shape \[1, 15, 64\] for "
            r"tokens \[1, 7\], but the same number of states is needed for every token",
        ),
    ],
)
def test_model_that_cannot_be_streamed_is_refused_with_a_reason(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_family(tmp_path / "base", family, **changes)
    with pytest.raises(ModelError, match=message):
        _quantize(tmp_path)


def test_model_that_leaves_out_blocks_for_text_is_refused(tmp_path: Path) -> None:
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_layers": [2],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        **tokens,
    }
    vision = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "intermediate_layers_indices": [0, 1],
        "image_size": 32,
        "vision_output_dim": 192,
    }
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=127)
    MllamaForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"for text, the model runs only 2 of its 3 blocks"):
        _quantize(tmp_path)


def _assert_every_linear_is_accounted_for(
    base: nn.Module, report: halfbyte.QuantizationReport, names: dict[str, str]
) -> None:
    blocks = find_blocks(base)
    linears = {
        f"{blocks.name(i)}.{name}"
        for i, block in enumerate(blocks.modules)
        for name in quantizable_linears(block)
    }
    model_name = {k.removesuffix(".qweight"): n.removesuffix(".qweight") for k, n in names.items()}
    quantized = {model_name[module.name] for module in report.modules}
    skipped = {module.name for module in report.skipped}
    assert all(module.reason for module in report.skipped)
    assert linears == quantized | {name for name in linears if name in skipped}
    assert quantized, "nothing was quantized"
    for module in report.modules:
        assert module.relative_error is None or module.relative_error < 0.2, module


def test_conv1d_and_linear_of_the_same_weight_give_the_same_codes() -> None:
    linear, conv = nn.Linear(64, 32), Conv1D(32, 64)
    weight = torch.randn(32, 64)
    set_linear_weight(linear, weight)
    set_linear_weight(conv, weight)
    x = torch.randn(3, 64)
    linear.bias = conv.bias = None
    torch.testing.assert_close(linear(x), x @ conv.weight)
