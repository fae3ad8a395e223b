"""Tiny GPTQ checkpoints made from Python integers: an independent implementation of the format.

Does not use ``halfbyte.packing`` or ``halfbyte.checkpoint``: words are built as one big integer per
column, weights as Python floats.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

WORD = 1 << 32


@dataclass(frozen=True, kw_only=True)
class TinyLinear:
    bits: int = 4
    in_features: int = 64
    out_features: int = 32
    group_size: int = 32
    symmetric: bool = True
    act_order: bool = False
    zero_offset: int = 1
    with_g_idx: bool = True
    with_bias: bool = False
    scale_dtype: torch.dtype = torch.float16


def pack_stream(codes: Sequence[int], bits: int) -> list[int]:
    """Concatenate codes, lowest bits first, and split the result into signed 32-bit words."""
    stream = sum(code << (bits * place) for place, code in enumerate(codes))
    words = [(stream >> (32 * i)) % WORD for i in range(len(codes) * bits // 32)]
    return [word - WORD if word >= WORD // 2 else word for word in words]


def make_linear(linear: TinyLinear, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors on disk by suffix, and the float64 weight [out, in]."""
    rng = random.Random(seed)
    rows, columns = range(linear.out_features), range(linear.in_features)
    num_groups = -(-linear.in_features // linear.group_size)
    top = 2**linear.bits - 1
    codes = [[rng.randint(0, top) for _ in columns] for _ in rows]
    middle = 2 ** (linear.bits - 1)
    zeros = [
        [middle if linear.symmetric else rng.randint(linear.zero_offset, top) for _ in rows]
        for _ in range(num_groups)
    ]
    scales = torch.tensor(
        [[rng.uniform(0.001, 0.02) * rng.choice([1, -1]) for _ in rows] for _ in range(num_groups)]
    ).to(linear.scale_dtype)
    g_idx = [column // linear.group_size for column in columns]
    if linear.act_order:
        rng.shuffle(g_idx)
    weight = [
        [float(scales[g_idx[i], o]) * (codes[o][i] - zeros[g_idx[i]][o]) for i in columns]
        for o in rows
    ]
    packed_columns = [pack_stream(codes[o], linear.bits) for o in rows]
    stored_zeros = [[zero - linear.zero_offset for zero in row] for row in zeros]
    tensors = {
        "qweight": torch.tensor(packed_columns, dtype=torch.int32).t().contiguous(),
        "qzeros": torch.tensor(
            [pack_stream(row, linear.bits) for row in stored_zeros], dtype=torch.int32
        ),
        "scales": scales,
    }
    if linear.with_g_idx:
        tensors["g_idx"] = torch.tensor(g_idx, dtype=torch.int32)
    if linear.with_bias:
        tensors["bias"] = torch.tensor([rng.uniform(-1, 1) for _ in rows]).to(linear.scale_dtype)
    return tensors, torch.tensor(weight, dtype=torch.float64)


def make_model(
    linears: Mapping[str, TinyLinear], seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return all tensors on disk, including an embedding and a norm, and the weights by module."""
    tensors = {
        "model.embed_tokens.weight": torch.arange(24.0).reshape(6, 4).to(torch.bfloat16),
        "model.norm.weight": torch.ones(5, dtype=torch.float16),
    }
    weights: dict[str, Tensor] = {}
    for place, (name, linear) in enumerate(linears.items()):
        packed, weights[name] = make_linear(linear, seed + place)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
    return tensors, weights


def labels_of(linear: TinyLinear, **changes: Any) -> dict[str, Any]:
    labels = {
        "bits": linear.bits,
        "group_size": linear.group_size,
        "sym": linear.symmetric,
        "desc_act": linear.act_order,
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if linear.zero_offset else "gptq_v2",
        **changes,
    }
    return {key: value for key, value in labels.items() if value is not ...}


def write_model(
    folder: Path,
    linears: Mapping[str, TinyLinear],
    *,
    labels: Mapping[str, Any] | None = None,
    config_file: str = "config.json",
    file_name: str = "model.safetensors",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Write a checkpoint of one file with the safetensors library; return the weights by module.

    ``labels`` changes the config made from the first linear; a value of ``...`` removes the key.
    """
    tensors, weights = make_model(linears, seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / file_name, metadata={"format": "pt"})
    section = labels_of(next(iter(linears.values())), **(labels or {}))
    model_config: dict[str, Any] = {"model_type": "llama", "hidden_size": 64}
    if config_file == "config.json":
        model_config["quantization_config"] = section
    else:
        (folder / config_file).write_text(json.dumps(section))
    (folder / "config.json").write_text(json.dumps(model_config))
    return weights
