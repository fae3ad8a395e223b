from __future__ import annotations

import pytest
import torch
from tests.helpers.checkpoints import (
    TINY_SIZES,
    Recipe,
    edit_tensors,
    tiny_llama_config,
    write_checkpoint,
)
from tests.helpers.families import token_lists
from transformers import AutoModelForCausalLM

from halfbyte.checkpoint.read import open_checkpoint
from halfbyte.convert.detect import open_source
from halfbyte.convert.reorder import find_head_order, fold_act_order
from halfbyte.convert.run import ConversionConfig, convert

IDS = torch.tensor(token_lists(2, 24))


@pytest.fixture
def reordered(tmp_path):
    """A model with act-order in the down projections only."""
    recipe = Recipe(act_order=True, skip="lm_head|self_attn|gate_proj|up_proj")
    write_checkpoint(tmp_path / "a", tiny_llama_config(), recipe)
    return tmp_path / "a"


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("dense_feeders", [True, False])
@pytest.mark.parametrize("to", ["awq", "compressed-tensors", "mlx"])
def test_down_projections_fold_into_gate_and_up(tmp_path, to, dense_feeders):
    skip = "lm_head|self_attn" + ("|gate_proj|up_proj" if dense_feeders else "")
    write_checkpoint(tmp_path / "a", tiny_llama_config(), Recipe(act_order=True, skip=skip))
    source = open_source(tmp_path / "a")
    specs = {name: source.describe(name) for name in source.linears}
    folded = fold_act_order(source, specs)
    assert set(folded.columns) == {f"model.layers.{n}.mlp.down_proj" for n in (0, 1)}
    options = {} if dense_feeders else {"allow_error": True}
    report = convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to=to, **options))
    assert report.folded == 2
    # gate and up read the residual stream: their own order does not fold
    assert len(report.rounded) == (0 if dense_feeders else 4)
    convert(tmp_path / "b", tmp_path / "c", config=ConversionConfig(to="gptq"))
    # the same sums in another order; dense fp16 adds its one rounding
    tolerance = 1e-9 if dense_feeders else 1e-2
    torch.testing.assert_close(
        logits(tmp_path / "c"), logits(tmp_path / "a"), rtol=0, atol=tolerance
    )


def test_folding_reorders_weights_without_changing_them(reordered, tmp_path):
    convert(reordered, tmp_path / "b", config=ConversionConfig(to="compressed-tensors"))
    convert(tmp_path / "b", tmp_path / "c", config=ConversionConfig(to="gptq"))
    before, after = open_checkpoint(reordered), open_checkpoint(tmp_path / "c")
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.down_proj"
        order = torch.argsort(before.load_linear(name).g_idx.long(), stable=True)
        assert torch.equal(after.dequantize(name), before.dequantize(name)[:, order])
        for feeder in ("gate_proj", "up_proj"):
            key = f"model.layers.{layer}.mlp.{feeder}.weight"
            assert torch.equal(after.files.load([key])[key], before.files.load([key])[key][order])


def test_unfoldable_act_order_is_refused_with_counts(tmp_path):
    write_checkpoint(tmp_path / "a", tiny_llama_config(), Recipe(act_order=True))
    with pytest.raises(ValueError, match=r"cannot represent 12 of 14 linears .*no g_idx") as error:
        convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="awq"))
    assert "and 9 more" in str(error.value)
    assert not (tmp_path / "b").exists()


def test_heads_fold_if_groups_stay_within_them():
    # two heads of 8 share one value head; groups of 4: even and odd channels of each head
    within = [0, 1, 0, 1, 0, 1, 0, 1]
    groups = torch.tensor(within + [group + 2 for group in within])
    config = {"num_attention_heads": 2, "num_key_value_heads": 1}
    columns, rows = find_head_order(groups, 4, config)
    assert rows.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert columns.tolist() == [*rows.tolist(), *(row + 8 for row in rows.tolist())]
    assert groups[columns].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert find_head_order(groups, 4, {**config, "num_kv_shared_layers": 2}) is None


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ([0, 1] * 8, 8),  # each group is spread over two heads
        ([0, 1, 0, 1, 0, 1, 0, 1, 2, 2, 3, 3, 2, 2, 3, 3], 4),  # heads that need other orders
        ([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5], 3),  # groups that straddle heads
    ],
)
def test_heads_do_not_fold_otherwise(groups, size):
    config = {"num_attention_heads": 2, "num_key_value_heads": 1}
    assert find_head_order(torch.tensor(groups), size, config) is None


def test_attention_output_folds_into_the_values(tmp_path):
    write_checkpoint(
        tmp_path / "a",
        tiny_llama_config(num_key_value_heads=4),
        Recipe(act_order=True, group_size=8, skip="lm_head|mlp|[qkv]_proj"),
    )

    # groups of 8 within heads of 16, in an order of their own in each head
    def within_heads(tensors):
        generator = torch.Generator().manual_seed(0)
        for name in tensors:
            if name.endswith("o_proj.g_idx"):
                heads = [torch.randperm(16, generator=generator) // 8 + 2 * h for h in range(4)]
                tensors[name] = torch.cat(heads).to(torch.int32)

    edit_tensors(tmp_path / "a", within_heads)
    config = ConversionConfig(to="compressed-tensors")
    assert convert(tmp_path / "a", tmp_path / "b", config=config).folded == 2
    convert(tmp_path / "b", tmp_path / "c", config=ConversionConfig(to="gptq"))
    torch.testing.assert_close(logits(tmp_path / "c"), logits(tmp_path / "a"), rtol=0, atol=1e-9)


def test_output_gates_prevent_folding(tmp_path):
    """Qwen3-Next gates the attention output by rows of q_proj, which are not reordered."""
    from transformers import Qwen3NextConfig

    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    linear_attention = {"linear_num_value_heads": 2, "linear_num_key_heads": 2}
    config = Qwen3NextConfig(
        **{**TINY_SIZES, **sizes, **linear_attention},
        layer_types=["full_attention"] * 2,
        num_experts=0,
        mlp_only_layers=[0, 1],
    )
    write_checkpoint(tmp_path / "a", config, Recipe(skip="lm_head|mlp|[qkv]_proj"))
    within = torch.cat([torch.tensor([0, 1]).repeat(32), torch.tensor([2, 3]).repeat(32)])

    def reorder(tensors):
        for name in tensors:
            if name.endswith("o_proj.g_idx"):
                tensors[name] = within.to(torch.int32)

    edit_tensors(tmp_path / "a", reorder)
    source = open_source(tmp_path / "a")
    specs = {name: source.describe(name) for name in source.linears}
    assert not any(spec.is_ordered for spec in specs.values())
    assert fold_act_order(source, specs) is None


def test_norm_in_the_mlp_prevents_folding(tmp_path, reordered):
    edit_tensors(
        reordered, lambda t: t.update({"model.layers.0.mlp.ffn_norm.weight": torch.ones(96)})
    )
    source = open_source(reordered)
    specs = {name: source.describe(name) for name in source.linears}
    assert set(fold_act_order(source, specs).columns) == {"model.layers.1.mlp.down_proj"}
