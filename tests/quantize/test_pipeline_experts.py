"""From a model folder to a checkpoint: layers of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.helpers.checkpoints import read_tensors
from tests.helpers.families import FAMILIES, VOCABULARY, build_random, token_lists
from tests.helpers.runs import assert_loads_and_computes, quantize, run
from transformers import AutoConfig

from halfbyte.checkpoint.read import open_checkpoint
from halfbyte.quant_config import CalibrationConfig, QuantConfig
from halfbyte.quantize.model_card import write_card_body
from halfbyte.quantize.report import expert_of


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    "skip", [r"experts\.1\.", r"experts\.\d+\.(w2|down_proj)", r"layers\.0\..*experts\.", "experts"]
)
def test_experts_left_in_16_bits(family: str, skip: str, tmp_path: Path) -> None:
    config = QuantConfig(group_size=32, skip=(skip,))
    model, report, checkpoint = run(tmp_path, config, family=family)
    left = [m.name for m in report.skipped if "skip pattern" in m.reason]
    assert left
    assert not any("matches no module" in note for note in report.notes)
    assert_loads_and_computes(model, checkpoint)


@pytest.mark.parametrize("skip", ["q_proj", "k_proj"])
def test_parts_of_a_fused_tensor_left_in_16_bits(skip: str, tmp_path: Path) -> None:
    # On disk query_key_value, in the model three linears.
    sizes = {"num_hidden_layers": 1, "first_k_dense_replace": 1, "num_experts": 4}
    changes = {**FAMILIES["qwen3"], **sizes, "n_group": 1, "topk_group": 1}
    model = build_random(AutoConfig.for_model("sarvam_moe", **changes), std=0.05)
    model.save_pretrained(tmp_path / "base")
    assert any("query_key_value" in name for name in read_tensors(tmp_path / "base"))
    config = QuantConfig(group_size=32, skip=(skip,))
    report = quantize(tmp_path / "base", tmp_path / "out", config)
    assert len(report.modules) == 6
    written = read_tensors(tmp_path / "out")
    assert not any("query_key_value" in name for name in written)
    assert f"model.layers.0.self_attn.{skip}.weight" in written
    assert_loads_and_computes(model, open_checkpoint(tmp_path / "out"))


def test_routers_stay_in_16_bits_with_a_reason(tmp_path: Path) -> None:
    _, report, _ = run(tmp_path, QuantConfig(group_size=32), family="qwen3_moe")
    gates = [m for m in report.skipped if m.name.endswith("mlp.gate")]
    assert not [m for m in report.modules if m.name.endswith("mlp.gate")]
    assert all(m.reason == "it routes tokens to experts" for m in gates)


def test_experts_with_few_tokens_use_the_pool_and_note_it(tmp_path: Path) -> None:
    # About 192 tokens for each expert: too few for a width of 64, enough for one of 32.
    _, report, _ = run(
        tmp_path,
        QuantConfig(group_size=32),
        family="qwen3_moe",
        calibration=CalibrationConfig(samples=12, length=32),
        text=token_lists(12, 32),
    )
    experts = [m for m in report.modules if ".experts." in m.name]
    helped = [m for m in experts if any("that of all experts" in note for note in m.notes)]
    assert 0 < len(helped) < len(experts)
    for module in experts:
        width = 64 if "down_proj" not in module.name else 32
        assert (module in helped) == (module.num_tokens < 4 * width), module
    for module in helped:
        width = 64 if "down_proj" not in module.name else 32
        share = 4 * width / (4 * width + module.num_tokens)
        assert f"only {module.num_tokens} tokens: {share:.0%} of its Hessian" in module.notes[0]
    coverage = report.expert_coverage()
    assert [block.block for block in coverage] == [0, 1]
    for block in coverage:
        assert len(block.tokens) == 4
        assert sum(block.tokens) == 2 * 12 * 32, "each token goes through two of them"
    assert "| block | experts | fewest | median | most | not reached |" in write_card_body(
        report, "x"
    )


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("model.layers.3.mlp.experts.12.down_proj", 12),
        ("model.layers.3.mlp.down_proj", None),
        ("model.layers.3.ffn.0.linear", None),
        ("model.layers.3.mlp.shared_experts.up_proj", None),
    ],
)
def test_number_of_an_expert_in_a_name(name: str, expert: int | None) -> None:
    assert expert_of(name) == expert


@pytest.mark.parametrize("experts", [4, 32])
def test_experts_of_a_layout_that_is_not_declared_are_listed(experts: int, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama4_text",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        intermediate_size_mlp=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=experts,
        interleave_moe_layer_step=1,
        pad_token_id=0,
    )
    model = build_random(config, std=0.05)
    model.save_pretrained(tmp_path / "base")
    report = quantize(tmp_path / "base", tmp_path / "out", QuantConfig(group_size=32))
    assert {m.name: m.reason for m in report.skipped} == {
        "model.layers.0.feed_forward.experts": "its 3-D weights cannot be split into linears",
        "model.layers.0.feed_forward.router": "Llama4Router does not compute what a linear does",
    }
    assert len(report.modules) == 4 + 3, "attention and the shared expert"
    # Per block: 3 x 64 x 96 of each expert and 64 of the router for each.
    left = experts * (3 * 64 * 96 + 64)
    assert report.unquantized_share == pytest.approx(left / (left + 3 * 64 * 96 + 192 * 64))
    assert_loads_and_computes(model, open_checkpoint(tmp_path / "out"))


def test_matrices_that_are_not_linears_are_listed(tmp_path: Path) -> None:
    changes = {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    }
    _, report, _ = run(tmp_path, QuantConfig(group_size=32), family="dbrx", changes=changes)
    reasons = {m.name: m.reason for m in report.skipped}
    name = "transformer.blocks.0.ffn.experts.mlp"
    assert reasons[name] == "its weights are matrices, but not those of a linear"


def test_router_inside_a_module_of_its_own_stays_in_16_bits(tmp_path: Path) -> None:
    changes = {"num_experts": 32, "num_dense_layers": 0, "num_hidden_layers": 1}
    _, report, _ = run(tmp_path, QuantConfig(group_size=32), family="afmoe", changes=changes)
    reasons = {m.name: m.reason for m in report.skipped}
    assert reasons["model.layers.0.mlp.router.gate"] == "it routes tokens to experts"


@pytest.mark.parametrize("changes", [{"weigh_tokens": True}, {"target_bits": 6.0}])
def test_experts_fused_on_disk_are_loaded_more_than_once(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    config = QuantConfig(group_size=32, **changes)
    model, report, checkpoint = run(tmp_path, config, family="gpt_oss")
    assert sum(".experts." in m.name for m in report.modules) == 2 * 4 * 3
    assert_loads_and_computes(model, checkpoint)


def test_every_token_goes_to_its_experts_and_no_other(tmp_path: Path) -> None:
    _, report, _ = run(tmp_path, QuantConfig(group_size=32), family="qwen3_moe")
    for block in range(2):
        for leaf in ("gate_proj", "down_proj"):
            routed = sum(
                m.num_tokens
                for m in report.modules
                if m.name.startswith(f"model.layers.{block}.mlp.experts") and m.name.endswith(leaf)
            )
            assert routed == 2 * 6 * 32
