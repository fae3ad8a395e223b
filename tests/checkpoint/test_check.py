"""Each rule of each consumer, with checkpoints that just meet and just violate it."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file
from tests.helpers.consumers import BLOCK, HIDDEN, Linear, check, llama, why

from halfbyte.checkpoint.check import check_consumers
from halfbyte.checkpoint.read import open_checkpoint
from halfbyte.errors import CheckpointError

ALL = {"transformers", "gptqmodel", "vllm-cpu", "vllm-marlin", "vllm-machete", "gguf"}


def test_default_of_halfbyte_loads_everywhere_on_any_number_of_devices(tmp_path):
    report = check(tmp_path, llama())
    assert {v.consumer for v in report.verdicts} == ALL
    assert {v.tensor_parallel for v in report.verdicts} == {None, 1, 2, 4, 8}
    assert [v for v in report.verdicts if not v.loads] == []
    assert report.notes == ()
    assert report.schemes == {"4 bits, group 128, symmetric": 7}
    json.dumps(report.to_dict())


@pytest.mark.parametrize(
    ("changes", "refusals"),
    [
        (
            {"bits": 8},
            {"vllm-cpu": f"it supports 4 bits, not 8: {BLOCK}"},
        ),
        (
            {"bits": 3},
            {
                "vllm-cpu": "4 or 8 bits, symmetric; this one has 3, symmetric",
                "vllm-marlin": "this one has 3",
                "vllm-machete": "this one has 3",
            },
        ),
        (
            {"symmetric": False},
            {
                "gptqmodel": "in the dialect 'gptq' only from gptqmodel",
                "vllm-cpu": "this one has 4, asymmetric",
                "vllm-marlin": "asymmetric",
                "vllm-machete": "asymmetric",
                "gguf": "only symmetric quantization: model.layers.0.mlp.down_proj and 6 more",
            },
        ),
        (
            {"bits": 3, "symmetric": False},
            {
                "gptqmodel": "in the dialect 'gptq' only from gptqmodel",
                "vllm-cpu": "this one has 3, asymmetric",
                "vllm-marlin": "this one has 3",
                "vllm-machete": "this one has 3",
            },
        ),
        ({"group_size": 64}, {}),
        ({"group_size": 32}, {"vllm-machete": "group size 32 is not one of -1, 64, 128"}),
        (
            {"group_size": 16},
            {
                "vllm-cpu": "group size 16 is not one of -1, 32, 64, 128",
                "vllm-marlin": "group size 16 is not one of -1, 32, 64, 128",
                "vllm-machete": "group size 16",
                "gguf": "group size 16 is not a multiple of 32",
            },
        ),
        ({"group_size": -1}, {}),
        (
            {"act_order": True},
            {
                "gguf": "it does not support act-order (g_idx is not in order)",
                "vllm-cpu": "it does not support desc_act: true in the config",
                "vllm-marlin": "it does not support act-order (g_idx is not in order)",
                "vllm-machete": "it does not support act-order (g_idx is not in order)",
            },
        ),
    ],
)
def test_settings_that_one_device_refuses(tmp_path, changes, refusals):
    report = check(tmp_path, llama(**changes))
    assert {
        v.consumer for v in report.verdicts if not v.loads and v.tensor_parallel in (None, 1)
    } == (set(refusals))
    for consumer, reason in refusals.items():
        assert reason in why(report, consumer)


@pytest.mark.parametrize(
    ("in_features", "out_features", "consumer", "reason"),
    [
        (HIDDEN + 32, 2 * HIDDEN, "vllm-cpu", ""),
        (
            HIDDEN + 16,
            2 * HIDDEN,
            "vllm-cpu",
            "in_features 1040 per device is not a multiple of 32",
        ),
        (
            HIDDEN,
            2 * HIDDEN + 16,
            "vllm-cpu",
            "out_features 2064 per device is not a multiple of 32",
        ),
        (
            HIDDEN + 64,
            2 * HIDDEN,
            "vllm-marlin",
            "in_features 1088 per device is not a multiple of 128",
        ),
        (
            HIDDEN,
            2 * HIDDEN + 32,
            "vllm-marlin",
            "out_features 2080 per device is not a multiple of 64",
        ),
        (HIDDEN + 64, 2 * HIDDEN, "vllm-machete", ""),
        (
            HIDDEN + 32,
            2 * HIDDEN,
            "vllm-machete",
            "in_features 1056 per device is not a multiple of 64",
        ),
        (
            HIDDEN,
            2 * HIDDEN + 64,
            "vllm-machete",
            "out_features 2112 per device is not a multiple of 128",
        ),
        (HIDDEN + 16, 2 * HIDDEN, "gguf", "in_features 1040 per device is not a multiple of 32"),
        (HIDDEN, 2 * HIDDEN + 16, "gguf", ""),
    ],
)
def test_widths_that_each_kernel_takes(tmp_path, in_features, out_features, consumer, reason):
    linear = Linear(in_features, out_features, group_size=-1)
    found = why(check(tmp_path, {"mlp.fc1": linear}), consumer)
    assert found == (f"{reason}: {BLOCK}mlp.fc1" if reason else "")


def test_ragged_groups_are_refused_by_vllm_alone(tmp_path):
    report = check(tmp_path, {"mlp.fc1": Linear(HIDDEN + 64, HIDDEN)})
    assert why(report, "gptqmodel") == why(report, "gguf") == ""
    assert "in_features 1088 per device is not a multiple of group size 128" in why(
        report, "vllm-cpu"
    )
    assert report.schemes == {"4 bits, group 128, ragged, symmetric": 1}


@pytest.mark.parametrize(
    ("labels", "refused"),
    [
        ({"sym": False}, True),
        ({"sym": False, "meta": {"quantizer": ["halfbyte:0.1.0"]}}, True),
        ({"sym": False, "meta": {"quantizer": "someone"}}, True),
        ({"sym": False, "meta": {"quantizer": ["GPTQModel:7.7.0"]}}, False),
        ({"sym": False, "meta": {"quantizer": "gptqmodel:5.0.0"}}, False),
        ({"sym": False, "checkpoint_format": "gptq_v2"}, False),
        ({"sym": True}, False),
    ],
)
def test_asymmetric_zeros_in_v1_are_refused_by_gptqmodel_unless_it_wrote_them(
    tmp_path, labels, refused
):
    v2 = "checkpoint_format" in labels
    linear = Linear(HIDDEN, HIDDEN, symmetric=labels["sym"], zero_offset=0 if v2 else 1)
    found = why(check(tmp_path, {"mlp.fc1": linear}, labels=labels), "gptqmodel")
    reason = "it accepts asymmetric zeros in the dialect 'gptq' only from gptqmodel"
    assert found == (f"{reason}, which meta.quantizer does not name" if refused else "")


def test_down_projection_is_split_along_in_and_gate_along_out(tmp_path):
    """1536 inputs in groups of 128 on 8 devices: a device's 192 would cut a group in two."""
    linears = llama() | {"mlp.down_proj": Linear(1536, HIDDEN)}
    report = check(tmp_path, linears)
    assert why(report, "vllm-cpu", 4) == ""
    assert why(report, "vllm-cpu", 8) == (
        f"in_features 192 per device is not a multiple of group size 128: {BLOCK}mlp.down_proj"
    )


def test_square_output_projection_is_split_along_in(tmp_path):
    attention = {n: Linear(512, 512) for n in llama() if "self_attn" in n}
    report = check(tmp_path, attention, config={"hidden_size": 512})
    assert why(report, "vllm-cpu", 4) == ""
    assert why(report, "vllm-cpu", 8) == (
        f"in_features 64 per device is not a multiple of group size 128: {BLOCK}self_attn.o_proj"
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "devices", "reason"),
    [
        (8, 2, 8, ""),  # key-value heads are repeated
        (9, 3, 2, "9 attention heads cannot be split over 2 devices"),
        (12, 3, 2, "3 key-value heads cannot be split over 2 devices"),
    ],
)
def test_heads_must_split_evenly(tmp_path, heads, kv_heads, devices, reason):
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    assert why(check(tmp_path, llama(), config=config), "vllm-cpu", devices) == reason


def test_fused_linears_are_split_as_one(tmp_path):
    """Each of q, k and v is too narrow for Machete on 8 devices; together they are not."""
    linears = {n: lin for n, lin in llama().items() if n[-6:] in ("q_proj", "k_proj", "v_proj")}
    report = check(tmp_path, linears | {"self_attn.k_proj": Linear(HIDDEN, 2 * HIDDEN)})
    assert why(report, "vllm-machete", 8) == ""
    report = check(tmp_path, {"self_attn.q_proj": Linear(HIDDEN, HIDDEN // 2)})
    assert "out_features 64 per device is not a multiple of 128" in why(report, "vllm-machete", 8)


def test_key_value_heads_are_repeated_rather_than_split(tmp_path):
    config = {"num_attention_heads": 8, "num_key_value_heads": 2}
    report = check(tmp_path, {"self_attn.k_proj": Linear(HIDDEN, 128)}, config=config)
    for devices in (2, 8):
        assert f"out_features 64 per device is not a multiple of 128: {BLOCK}" in why(
            report, "vllm-machete", devices
        )


DESC_ACT = "it does not support desc_act: true in the config, unless group_size is -1"


@pytest.mark.parametrize(
    ("labels", "refused"),
    [
        ({"desc_act": True}, True),
        ({"desc_act": False, "dynamic": {"+:.*q_proj": {"desc_act": True}}}, True),
        ({"desc_act": False, "dynamic": {"-:.*nothing": {"desc_act": True}}}, False),
        ({"desc_act": True, "dynamic": {".*": {"desc_act": False}}}, True),
    ],
)
@pytest.mark.parametrize("consumer", ["vllm-cpu", "vllm-marlin", "vllm-machete"])
def test_a_config_that_says_desc_act_is_refused_by_vllm(tmp_path, consumer, labels, refused):
    report = check(tmp_path, llama(), labels=labels)
    assert why(report, consumer) == (DESC_ACT if refused else "")
    assert why(report, "gptqmodel") == ""


def test_desc_act_means_nothing_to_vllm_where_a_row_is_one_group(tmp_path):
    report = check(tmp_path, llama(group_size=-1), labels={"desc_act": True})
    assert why(report, "vllm-cpu") == ""
    labels = {"desc_act": True, "dynamic": {r"+:.*mlp": {"group_size": 128}}}
    blocks = llama(group_size=-1) | {n: lin for n, lin in llama().items() if "mlp" in n}
    assert why(check(tmp_path, blocks, labels=labels), "vllm-cpu") == DESC_ACT


def test_fused_linears_with_different_grids_are_refused(tmp_path):
    linears = llama() | {"self_attn.k_proj": Linear(HIDDEN, HIDDEN, bits=8)}
    report = check(tmp_path, linears, labels={"dynamic": {"+:.*k_proj": {"bits": 8}}})
    assert why(report, "gptqmodel") == ""
    assert "it fuses q_proj, k_proj, v_proj, which have different grids (4 bits" in why(
        report, "vllm-marlin"
    )


def test_fused_linears_of_which_one_is_dense_are_refused(tmp_path):
    linears = llama()
    del linears["self_attn.v_proj"]
    report = check(
        tmp_path,
        linears,
        labels={"dynamic": {"-:.*v_proj": {}}},
        dense={f"{BLOCK}self_attn.v_proj": (HIDDEN, HIDDEN)},
    )
    assert why(report, "gptqmodel") == ""
    assert "it fuses q_proj, k_proj, v_proj, of which v_proj is in 16 bits" in why(
        report, "vllm-marlin"
    )


def test_mixed_bits_without_rules_load_where_the_tensors_are_believed(tmp_path):
    linears = llama() | {"mlp.down_proj": Linear(2 * HIDDEN, HIDDEN, bits=8)}
    report = check(tmp_path, linears)
    assert why(report, "transformers") == why(report, "gguf") == ""
    reason = f"the config says 4 bits, the tensors have 8: {BLOCK}mlp.down_proj"
    assert why(report, "gptqmodel") == reason
    assert reason in why(report, "vllm-marlin")
    rules = {f"+:^{BLOCK}mlp.down_proj$": {"bits": 8}}
    assert why(check(tmp_path, linears, labels={"dynamic": rules}), "vllm-marlin") == ""


def test_other_group_size_without_rule_is_named(tmp_path):
    linears = llama() | {"mlp.down_proj": Linear(2 * HIDDEN, HIDDEN, group_size=64)}
    report = check(tmp_path, linears)
    for consumer in ("gptqmodel", "vllm-marlin"):
        assert "the config says group size 128, the tensors have 64" in why(report, consumer)


def test_zeros_of_the_other_dialect_matter_to_gptqmodel_alone(tmp_path):
    report = check(tmp_path, llama(zero_offset=0))
    assert "it trusts checkpoint_format, which is 'gptq' and does not match qzeros" in why(
        report, "gptqmodel"
    )
    assert [v.consumer for v in report.verdicts if not v.loads] == ["gptqmodel"]
    assert "stores 8 everywhere" in report.notes[0]
    assert report.notes[1] == "The same for 6 more linears."


def test_skip_rule_on_a_quantized_linear_is_named(tmp_path):
    report = check(tmp_path, llama(), labels={"dynamic": {"-:.*down_proj": {}}})
    assert "dynamic in the config says that it is not quantized" in why(report, "gptqmodel")
    assert "according to the config, it would load the linear in 16 bits" in why(
        report, "vllm-marlin"
    )


def test_dense_linear_that_the_list_covers_is_named(tmp_path):
    dense = {"visual.blocks.0.mlp.down_proj": (64, 64), "model.embed_tokens": (10, 64)}
    report = check(tmp_path, llama(), dense=dense)
    assert why(report, "vllm-marlin") == (
        "it would expect packed weights, but the linear is in 16 bits: "
        "visual.blocks.0.mlp.down_proj"
    )
    labels = {"dynamic": {"-:visual.*": {}}}
    assert why(check(tmp_path, llama(), dense=dense, labels=labels), "vllm-marlin") == ""


def test_order_that_the_config_denies_is_named(tmp_path):
    report = check(tmp_path, llama(act_order=True), labels={"desc_act": False})
    assert "it does not support act-order (g_idx is not in order)" in why(report, "vllm-cpu")
    assert why(report, "gptqmodel") == ""


@pytest.mark.parametrize("key", ["bits", "group_size", "desc_act", "sym"])
def test_keys_that_vllm_demands(tmp_path, key):
    report = check(tmp_path, llama(), labels={key: None})
    assert why(report, "vllm-cpu") == f"the quantization config has no {key}"
    assert why(report, "transformers") == ""


def test_quantized_head_must_be_declared(tmp_path):
    linears = llama() | {"lm_head": Linear(HIDDEN, 4 * HIDDEN)}
    report = check(tmp_path, linears)
    assert "output head is quantized, but lm_head in the config is false" in why(report, "vllm-cpu")
    assert why(check(tmp_path, linears, labels={"lm_head": True}), "vllm-cpu", 8) == ""


def expert_block() -> dict[str, Linear]:
    return {
        f"mlp.experts.{i}.{name}": linear
        for i in range(2)
        for name, linear in (
            ("gate_proj", Linear(HIDDEN, 512)),
            ("up_proj", Linear(HIDDEN, 512)),
            ("down_proj", Linear(512, HIDDEN)),
        )
    }


def test_experts_follow_the_rule_of_their_container(tmp_path):
    report = check(tmp_path, expert_block())
    assert why(report, "vllm-marlin") == ""
    rules = {rf"-:^{BLOCK}mlp.experts$": {}}
    report = check(tmp_path, expert_block(), labels={"dynamic": rules})
    assert "it would load the linear in 16 bits" in why(report, "vllm-marlin")


def test_dense_expert_beside_quantized_ones_is_named(tmp_path):
    linears = expert_block()
    del linears["mlp.experts.1.down_proj"]
    report = check(tmp_path, linears, dense={f"{BLOCK}mlp.experts.1.down_proj": (HIDDEN, 512)})
    assert (
        "it would expect packed weights, but the linear is in 16 bits: "
        f"{BLOCK}mlp.experts.1.down_proj" in why(report, "vllm-marlin")
    )


def test_damaged_values_are_raised_not_reported(tmp_path):
    check(tmp_path, llama())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{BLOCK}mlp.up_proj.g_idx"][3] = 99
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mlp.up_proj.g_idx has values 0\.\.99"):
        check_consumers(open_checkpoint(tmp_path))


def test_verdict_says_how_its_rules_are_known(tmp_path):
    report = check(tmp_path, llama())
    assert {v.evidence for v in report.verdicts} == {"ran", "read"}
