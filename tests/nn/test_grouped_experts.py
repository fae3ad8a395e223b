"""Experts that run together, in Triton's interpreter, against one after the other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tests.helpers.checkpoints import TINY_SIZES, Recipe, write_checkpoint
from tests.helpers.interpreted import interpret
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import halfbyte
from halfbyte.integrations.graph_steps import GraphSteps, find_cache_obstacle
from halfbyte.kernels import triton_decode, triton_experts, triton_linear
from halfbyte.kernels.triton_linear import TritonLinear
from halfbyte.model.experts import UnfusedExperts
from halfbyte.nn import gpu_step, grouped_experts
from halfbyte.nn.fusion import fuse_linears
from halfbyte.nn.grouped_experts import find_grouping_obstacle, group_experts
from halfbyte.nn.linear import QuantLinear
from halfbyte.nn.replace import quantized_linears

pytest.importorskip("triton")

SIZES = TINY_SIZES | {"hidden_size": 64, "num_hidden_layers": 2}
EXPERTS = {
    **SIZES,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "head_dim": 32,
}
KINDS = {
    "qwen3": (Qwen3MoeConfig(**EXPERTS, norm_topk_prob=True), Recipe()),
    "asymmetric, act-order": (
        Qwen3MoeConfig(**EXPERTS, norm_topk_prob=False),
        Recipe(act_order=True, symmetric=False),
    ),
    "mixtral": (
        MixtralConfig(
            **SIZES | {"intermediate_size": 64}, num_local_experts=4, num_experts_per_tok=2
        ),
        Recipe(bits=3),
    ),
    "a shared expert": (
        Qwen2MoeConfig(
            **{k: v for k, v in EXPERTS.items() if k != "head_dim"},
            shared_expert_intermediate_size=64,
        ),
        Recipe(skip=r"lm_head|gate$"),
    ),
}


@pytest.fixture(autouse=True)
def triton_on_the_cpu(monkeypatch):
    interpret(
        monkeypatch,
        "halfbyte.kernels.triton_kernels",
        "halfbyte.kernels.triton_decode_kernels",
        "halfbyte.kernels.triton_expert_kernels",
    )
    for module in (triton_experts, triton_linear, gpu_step):
        monkeypatch.setattr(module, "DEVICES", ("cpu",))
    monkeypatch.setattr(TritonLinear, "find_obstacle", lambda self: None)
    monkeypatch.setattr(triton_decode, "choose_splits", lambda device, programs: 1)
    # Few programs: the interpreter runs them one after the other.
    for module in (triton_experts, triton_linear):
        monkeypatch.setattr(module, "count_processors", lambda device: 1)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def load(folder, kind="qwen3", group=True):
    config, recipe = KINDS[kind]
    write_checkpoint(folder, config, recipe)
    model = halfbyte.load(folder, dtype=torch.float16)
    for _, linear in quantized_linears(model):
        linear.prepare(kernel="triton")
    fuse_linears(model)
    if group:
        assert group_experts(model) == len(list(experts_of(model)))
    return model


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, UnfusedExperts)]


def run_alone(experts, monkeypatch, *given):
    with monkeypatch.context() as patch:
        patch.setattr(experts, "grouped", None)
        return experts(*given)


def choose(experts, tokens, per_token=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    odds = torch.rand(tokens, experts.num_experts, generator=generator) ** 3 + 1e-6
    weights = torch.rand(tokens, per_token, generator=generator).half()
    return torch.multinomial(odds, per_token, generator=generator), weights
