"""Checkpoints with correct shapes but no content, to check which consumers load them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from halfbyte.checkpoint.check import CheckReport, Verdict, check_consumers
from halfbyte.checkpoint.read import open_checkpoint
from halfbyte.packing import pack_zeros

BLOCK = "model.layers.0."
HIDDEN = 1024


class Linear:
    """Tensors of a quantized linear with correct shapes and arbitrary codes."""

    def __init__(self, in_features: int, out_features: int, **changes: Any) -> None:
        self.sizes = {"in_features": in_features, "out_features": out_features}
        self.bits: int = changes.pop("bits", 4)
        self.group_size: int = changes.pop("group_size", 128)
        self.symmetric: bool = changes.pop("symmetric", True)
        self.act_order: bool = changes.pop("act_order", False)
        self.zero_offset: int = changes.pop("zero_offset", 1)
        assert not changes

    def tensors(self) -> dict[str, torch.Tensor]:
        in_features, out_features = self.sizes["in_features"], self.sizes["out_features"]
        size = in_features if self.group_size == -1 else self.group_size
        groups = -(-in_features // size)
        zeros = torch.full((out_features, groups), 2 ** (self.bits - 1))
        if not self.symmetric:
            zeros[0, 0] = 1
        g_idx = torch.arange(in_features, dtype=torch.int32) // size
        return {
            "qweight": torch.zeros(in_features * self.bits // 32, out_features, dtype=torch.int32),
            "qzeros": pack_zeros(zeros, self.bits, self.zero_offset),
            "scales": torch.ones(groups, out_features, dtype=torch.float16),
            "g_idx": g_idx.flip(0) if self.act_order else g_idx,
        }


def llama(**changes: Any) -> dict[str, Linear]:
    """Return a block whose sizes every consumer supports on up to 8 devices."""
    return {
        "self_attn.q_proj": Linear(HIDDEN, HIDDEN, **changes),
        "self_attn.k_proj": Linear(HIDDEN, HIDDEN, **changes),
        "self_attn.v_proj": Linear(HIDDEN, HIDDEN, **changes),
        "self_attn.o_proj": Linear(HIDDEN, HIDDEN, **changes),
        "mlp.gate_proj": Linear(HIDDEN, 2 * HIDDEN, **changes),
        "mlp.up_proj": Linear(HIDDEN, 2 * HIDDEN, **changes),
        "mlp.down_proj": Linear(2 * HIDDEN, HIDDEN, **changes),
    }


def check(
    folder: Path,
    linears: Mapping[str, Linear],
    *,
    labels: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    dense: Mapping[str, tuple[int, ...]] | None = None,
) -> CheckReport:
    tensors = {
        f"{name if name == 'lm_head' else BLOCK + name}.{suffix}": tensor
        for name, linear in linears.items()
        for suffix, tensor in linear.tensors().items()
    }
    tensors |= {f"{name}.weight": torch.zeros(shape) for name, shape in (dense or {}).items()}
    save_file(tensors, folder / "model.safetensors")
    first = next(iter(linears.values()))
    section = {
        "bits": first.bits,
        "group_size": first.group_size,
        "sym": first.symmetric,
        "desc_act": first.act_order,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "modules_in_block_to_quantize": [[name] for name in linears],
        **(labels or {}),
    }
    model_config = {
        "hidden_size": HIDDEN,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        **(config or {}),
        "quantization_config": section,
    }
    (folder / "config.json").write_text(json.dumps(model_config))
    return check_consumers(open_checkpoint(folder))


def verdict(report: CheckReport, consumer: str, devices: int = 1) -> Verdict:
    size = devices if consumer.startswith("vllm") else None
    (found,) = (v for v in report.verdicts if v.consumer == consumer and v.tensor_parallel == size)
    return found


def why(report: CheckReport, consumer: str, devices: int = 1) -> str:
    found = verdict(report, consumer, devices)
    assert found.loads == (not found.reasons)
    return " | ".join(found.reasons)
