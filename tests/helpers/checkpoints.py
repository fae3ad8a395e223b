"""Tiny GPTQ checkpoints on disk, with random models and random codes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.helpers.packed import make_linear
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from halfbyte.model.experts import unfuse_experts


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Properties of a checkpoint; the defaults are those of halfbyte."""

    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    act_order: bool = False
    zero_offset: int = 1
    skip: str = r"lm_head|gate$|router"
    """Regular expression of modules that stay dense."""
    bits_for: Mapping[str, int] = field(default_factory=dict)
    """Other bits by regular expression of module names."""
    with_g_idx: bool = True
    size: float = 1.0
    """Scale of the weights: random 8-bit codes are 16 times as large as 4-bit ones."""
    dtype: torch.dtype = torch.float16
    """Dtype of the dense tensors and the biases."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the quantization config."""
    file_name: str = "model.safetensors"
    config_in: str = "config.json"
    """File of the quantization config."""


TINY_SIZES: Mapping[str, int] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_llama_config(**changes: Any) -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(**{**TINY_SIZES, **changes})


def build_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def write_checkpoint(
    folder: Path, config: PretrainedConfig, recipe: Recipe = Recipe()
) -> PreTrainedModel:
    """Write a checkpoint; return the equivalent float32 model (with experts split)."""
    model = build_model(config)
    unfuse_experts(model, lambda _: True)
    head = model.get_output_embeddings()
    if config.get_text_config().tie_word_embeddings and not re.search(recipe.skip, "lm_head"):
        head.weight = nn.Parameter(head.weight.data.clone())
    packed: dict[str, Tensor] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D) or re.search(recipe.skip, name):
            continue
        packed |= _pack(name, module, recipe, seed=len(packed))
    _round_rest(model, packed, recipe.dtype)
    dense = {
        key: value.to(recipe.dtype)
        for key, value in model.state_dict().items()
        if f"{key.rpartition('.')[0]}.qweight" not in packed
    }
    if config.get_text_config().tie_word_embeddings:
        dense.pop("lm_head.weight", None)
    tensors = revert_weight_conversion(model, dense | packed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        folder / recipe.file_name,
        metadata={"format": "pt"},
    )
    write_configs(folder, config, recipe, type(model).__name__)
    return model


def write_configs(
    folder: Path, config: PretrainedConfig, recipe: Recipe, architecture: str
) -> None:
    labels = {
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "sym": recipe.symmetric,
        "desc_act": recipe.act_order,
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if recipe.zero_offset else "gptq_v2",
        "pack_dtype": "int32",
        "lm_head": False,
        "dynamic": {},
        **recipe.labels,
    }
    values = config.to_dict() | {
        "architectures": [architecture],
        "dtype": str(recipe.dtype).removeprefix("torch."),
    }
    if recipe.config_in == "config.json":
        values["quantization_config"] = labels
    else:
        (folder / recipe.config_in).write_text(json.dumps(labels))
    (folder / "config.json").write_text(json.dumps(values))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite ``model.safetensors`` with changed tensors."""
    tensors = read_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _pack(name: str, module: nn.Module, recipe: Recipe, seed: int) -> dict[str, Tensor]:
    """Return tensors of random codes for a linear, and set its weight to the dequantized codes."""
    shape = module.weight.t().shape if isinstance(module, Conv1D) else module.weight.shape
    bits = next((b for p, b in recipe.bits_for.items() if re.search(p, name)), recipe.bits)
    group_size = shape[1] if recipe.group_size == -1 else recipe.group_size
    linear = make_linear(
        bits=bits,
        in_features=shape[1],
        out_features=shape[0],
        group_size=min(group_size, shape[1]),
        symmetric=recipe.symmetric,
        act_order=recipe.act_order,
        zero_offset=recipe.zero_offset,
        size=recipe.size,
        seed=seed,
    )
    weight = linear.weight.float()
    module.weight.data = weight.t().contiguous() if isinstance(module, Conv1D) else weight
    tensors = {
        "qweight": linear.stored.weight[0],
        "qzeros": linear.stored.qzeros,
        "scales": linear.stored.scales,
    }
    if recipe.with_g_idx:
        tensors["g_idx"] = linear.g_idx
    if module.bias is not None:
        module.bias.data = (torch.randn(shape[0]) * 0.1).to(recipe.dtype).float()
        tensors["bias"] = module.bias.data.to(recipe.dtype)
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def _round_rest(model: nn.Module, packed: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Round all other parameters to the 16-bit dtype in which they are stored."""
    for name, parameter in model.named_parameters():
        if f"{name.rpartition('.')[0]}.qweight" not in packed:
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)
