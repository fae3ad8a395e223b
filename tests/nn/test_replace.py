from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.helpers.packed import make_linear
from torch import nn
from transformers.pytorch_utils import Conv1D

from halfbyte.checkpoint.dialect import ZeroDialect
from halfbyte.checkpoint.layout import LinearLayout
from halfbyte.checkpoint.read import LinearInfo
from halfbyte.errors import CheckpointError
from halfbyte.model.blocks import linear_weight
from halfbyte.nn.linear import QuantLinear
from halfbyte.nn.replace import (
    StoredLinear,
    dequantize_linears,
    quantized_linears,
    replace_linears,
)

LAYOUT = LinearLayout(
    bits=4,
    in_features=128,
    out_features=64,
    num_groups=4,
    group_size=32,
    has_g_idx=True,
    has_bias=True,
)
STORED = StoredLinear(
    facts=LinearInfo(
        layout=LAYOUT,
        zeros=ZeroDialect(zero_offset=0, is_symmetric=False),
        has_trivial_groups=False,
    ),
    dtypes={"scales": torch.bfloat16, "g_idx": torch.int32, "bias": torch.float16},
)


class Model(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.block = nn.ModuleDict({"proj": linear, "norm": nn.LayerNorm(64)})


def with_layout(**changes) -> StoredLinear:
    facts = replace(STORED.facts, layout=replace(LAYOUT, **changes))
    return replace(STORED, facts=facts)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_replaces_by_name_where_the_old_linear_is(device, kind):
    with torch.device(device):
        model = Model(nn.Linear(128, 64) if kind == "Linear" else Conv1D(64, 128)).eval()
    replace_linears(model, {"block.proj": STORED}, dtype=torch.bfloat16)
    layer = model.block["proj"]
    assert isinstance(layer, QuantLinear)
    assert not layer.training
    assert layer.spec.act_order
    assert (layer.spec.zero_offset, layer.spec.symmetric) == (0, False)
    assert {name: (b.device.type, b.dtype) for name, b in layer.named_buffers()} == {
        "qweight": (device, torch.int32),
        "qzeros": (device, torch.int32),
        "scales": (device, torch.bfloat16),
        "g_idx": (device, torch.int32),
        "bias": (device, torch.float16),
    }
    assert [name for name, _ in quantized_linears(model)] == ["block.proj"]


def test_tensor_that_the_file_lacks_does_not_exist():
    model = Model(nn.Linear(128, 64, bias=False))
    stored = replace(with_layout(has_bias=False), dtypes={"scales": torch.float16})
    replace_linears(model, {"block.proj": stored}, dtype=torch.float32)
    assert set(model.block["proj"].state_dict()) == {"qweight", "qzeros", "scales"}


def test_other_size_is_refused_by_its_numbers():
    with pytest.raises(
        CheckpointError,
        match=r"block\.proj\.qweight is a 96 -> 64 linear of 4 bits, but the model's is 128 -> 64",
    ):
        replace_linears(
            Model(nn.Linear(128, 64)),
            {"block.proj": with_layout(in_features=96)},
            dtype=torch.float32,
        )


def test_what_is_no_linear_is_refused():
    with pytest.raises(CheckpointError, match=r"has block\.norm\.qweight, but .* a LayerNorm"):
        replace_linears(Model(nn.Linear(128, 64)), {"block.norm": STORED}, dtype=torch.float32)


def test_missing_bias_is_refused():
    with pytest.raises(CheckpointError, match=r"has no block\.proj\.bias"):
        replace_linears(
            Model(nn.Linear(128, 64)),
            {"block.proj": with_layout(has_bias=False)},
            dtype=torch.float32,
        )


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_dequantize_gives_ordinary_linears_with_the_same_weights(kind):
    linear = make_linear(act_order=True)
    model = Model(nn.Linear(128, 64) if kind == "Linear" else Conv1D(64, 128))
    replace_linears(
        model,
        {"block.proj": replace(with_layout(), dtypes=STORED.dtypes | {"scales": torch.float16})},
        dtype=torch.float32,
    )
    layer = model.block["proj"]
    layer.spec = linear.spec
    layer.load_state_dict(
        {
            "qweight": linear.stored.weight[0],
            "qzeros": linear.stored.qzeros,
            "scales": linear.stored.scales,
            "g_idx": linear.g_idx,
            "bias": torch.ones(64).half(),
        }
    )
    assert dequantize_linears(model, torch.float32) == ["block.proj"]
    dense = model.block["proj"]
    assert type(dense) is (nn.Linear if kind == "Linear" else Conv1D)
    assert torch.equal(linear_weight(dense), linear.weight.float())
    assert torch.equal(dense.bias, torch.ones(64))
