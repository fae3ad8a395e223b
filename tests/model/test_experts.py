"""Split experts compute the same as the fused ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.helpers.families import build_family, build_random
from torch import Tensor, nn
from transformers import AutoConfig

from halfbyte.errors import ModelError
from halfbyte.model.experts import (
    ProjectionNames,
    UnfusedExperts,
    find_fused_experts,
    projection_names,
    unfuse_experts,
)
from halfbyte.model.naming import Renaming

EXPERTS, HIDDEN, WIDE = 4, 8, 6


class FusedExperts(nn.Module):
    """The layouts that Transformers declares, computed in the plainest way."""

    def __init__(self, *, gate: bool, bias: bool, transposed: bool, concatenated: bool) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.has_gate, self.has_bias = gate, bias
        self.is_transposed, self.is_concatenated = transposed, concatenated
        self.act_fn = nn.SiLU()
        first = "gate_up_proj" if gate else "up_proj"
        for name, rows, columns in (
            (first, WIDE * (2 if gate else 1), HIDDEN),
            ("down_proj", HIDDEN, WIDE),
        ):
            shape = (columns, rows) if transposed else (rows, columns)
            self.register_parameter(name, nn.Parameter(torch.randn(EXPERTS, *shape)))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, rows)))

    def _apply_gate(self, both: Tensor) -> Tensor:
        if self.is_concatenated:
            gate, up = both.chunk(2, dim=-1)
        else:
            gate, up = both[..., ::2], both[..., 1::2]
        return self.act_fn(gate) * (up + 1)

    def _matmul(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight = getattr(self, name)[expert]
        y = x @ (weight if self.is_transposed else weight.t())
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(x)
        for token in range(x.shape[0]):
            for slot in range(index.shape[1]):
                expert = int(index[token, slot])
                if self.has_gate:
                    middle = self._apply_gate(self._matmul("gate_up_proj", expert, x[token]))
                else:
                    middle = self.act_fn(self._matmul("up_proj", expert, x[token]))
                result = self._matmul("down_proj", expert, middle)
                output[token] += weights[token, slot] * result
        return output


def routes(tokens: int, *, to: int = EXPERTS) -> tuple[Tensor, Tensor]:
    index = torch.stack([torch.randperm(to)[:2] for _ in range(tokens)])
    return index, torch.rand(tokens, 2)


LAYOUTS = [
    {"gate": gate, "bias": bias, "transposed": transposed, "concatenated": concatenated}
    for gate in (True, False)
    for bias in (True, False)
    for transposed in (True, False)
    for concatenated in (True, False)
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@torch.no_grad()
def test_split_experts_equal_the_fused_ones_in_every_layout(layout: dict[str, bool]) -> None:
    torch.manual_seed(0)
    fused = FusedExperts(**layout)
    x, (index, weights) = torch.randn(10, HIDDEN), routes(10)
    expected = fused(x, index, weights)
    split = UnfusedExperts(fused, ProjectionNames())
    torch.testing.assert_close(split(x, index, weights), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_split_experts_are_views_of_the_fused_memory() -> None:
    fused = FusedExperts(gate=True, bias=True, transposed=False, concatenated=True)
    address = fused.gate_up_proj.data_ptr()
    split = UnfusedExperts(fused, ProjectionNames(gate="w1", up="w3", down="w2"))
    assert split.projection(0, "w1").weight.data_ptr() == address
    assert not list(fused.parameters())
    assert sorted(n for n, _ in split.named_parameters())[:3] == [
        "0.w1.bias",
        "0.w1.weight",
        "0.w2.bias",
    ]


@pytest.mark.parametrize(
    ("observer", "gradient", "called"),
    [(None, False, [1, 3]), (lambda *_: None, False, range(EXPERTS)), (None, True, range(EXPERTS))],
)
def test_experts_without_tokens_run_only_for_an_observer_or_gradients(
    observer: Any, gradient: bool, called: Sequence[int]
) -> None:
    fused = FusedExperts(gate=True, bias=True, transposed=False, concatenated=True)
    x, index = torch.randn(5, HIDDEN), torch.tensor([[3, 1]] * 5)
    weights = torch.rand(5, 2)
    with torch.no_grad():
        expected = fused(x, index, weights)
    split = UnfusedExperts(fused, ProjectionNames())
    split.observer = observer
    seen: list[str] = []
    for name, module in split.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, n=name: seen.append(n))
    with torch.set_grad_enabled(gradient):
        found = split(x, index, weights)
    names = ("gate_proj", "up_proj", "down_proj")
    assert sorted(seen) == sorted(f"{expert}.{name}" for expert in called for name in names)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_observer_sees_each_experts_tokens_before_its_linears_run() -> None:
    fused = FusedExperts(gate=True, bias=False, transposed=False, concatenated=True)
    split = UnfusedExperts(fused, ProjectionNames())
    x, (index, weights) = torch.randn(12, HIDDEN), routes(12)
    expected = split(x, index, weights)
    told: dict[str, list[Tensor]] = {}
    doubled = []

    def observe(stage: str, inputs: Any) -> None:
        told[stage] = [get().clone() for get in inputs]
        if stage == "second":
            # What an observer changes counts for the forward that goes on behind it.
            for expert in range(EXPERTS):
                split.projection(expert, "down_proj").weight.data.mul_(2)
                doubled.append(expert)

    split.observer = observe
    found = split(x, index, weights)
    for expert, rows in enumerate(told["first"]):
        tokens = torch.where(index == expert)[0]
        assert torch.equal(rows, x[tokens])
    assert [rows.shape[1] for rows in told["second"]] == [WIDE] * EXPERTS
    torch.testing.assert_close(found, 2 * expected)
    assert doubled == [0, 1, 2, 3]


def test_stages_name_gate_and_up_together() -> None:
    fused = FusedExperts(gate=True, bias=False, transposed=False, concatenated=True)
    stages = UnfusedExperts(fused, ProjectionNames()).stages()
    assert stages["first"][3] == ["3.gate_proj", "3.up_proj"]
    assert stages["second"][3] == ["3.down_proj"]


def test_stages_without_a_gate() -> None:
    fused = FusedExperts(gate=False, bias=False, transposed=True, concatenated=True)
    assert UnfusedExperts(fused, ProjectionNames()).stages()["first"][1] == ["1.up_proj"]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("mixtral", ProjectionNames(gate="w1", up="w3", down="w2")),
        ("qwen3_moe", ProjectionNames()),
        ("deepseek_v3", ProjectionNames()),
    ],
)
def test_projections_are_named_as_on_disk(family: str, expected: ProjectionNames) -> None:
    assert projection_names(Renaming(build_family(family))) == expected


def test_only_selected_experts_are_split() -> None:
    model = build_family("qwen3_moe")
    assert len(find_fused_experts(model)) == 3
    replaced = unfuse_experts(model, lambda name: ".1." in name)
    assert replaced == ["model.layers.1.mlp.experts"]
    assert len(find_fused_experts(model)) == 2


def test_model_without_experts_is_unchanged() -> None:
    assert unfuse_experts(build_family("llama")) == []


def test_experts_with_a_norm_of_their_own_are_not_split() -> None:
    model = build_family("qwen3_moe")
    model.get_submodule("model.layers.2.mlp.experts").has_post_expert_norm = True
    with pytest.raises(
        ModelError, match=r"Cannot split model\.layers\.2\.mlp\.experts .*followed by a norm"
    ):
        unfuse_experts(model, lambda name: True)
    model = build_family("qwen3_moe")
    model.get_submodule("model.layers.2.mlp.experts").has_post_expert_norm = True
    assert len(unfuse_experts(model)) == 2, "without being asked for, it stays as it is"


@torch.no_grad()
def test_gpt_oss_with_biases_transposed_and_interleaved() -> None:
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=128,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    model = build_random(config, std=0.1)
    fused = find_fused_experts(model)["model.layers.0.mlp.experts"]
    assert fused.is_transposed
    assert fused.has_bias
    assert not fused.is_concatenated
    ids = torch.randint(0, 128, (2, 24))
    expected = model(ids).logits
    assert len(unfuse_experts(model)) == 2
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
