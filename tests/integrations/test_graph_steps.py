"""Decode steps over a static cache on a CPU: not captured, but checked for what that requires."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from halfbyte.errors import ConfigError
from halfbyte.integrations.graph_steps import GraphSteps, find_cache_obstacle, find_obstacle

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


class Launches(TorchDispatchMode):
    """Records the operations that a GPU would run, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_steps_give_the_logits_of_the_whole_sequence(model):
    ids = torch.tensor([[3, 14, 15, 9, 26, 5]])
    with torch.inference_mode():
        expected = model(ids).logits[0]
    steps = GraphSteps(model, 6)
    torch.testing.assert_close(steps.prefill(ids[:, :3]), expected[2], rtol=1e-4, atol=1e-4)
    for position in range(3, 6):
        found = steps(int(ids[0, position]), position)
        torch.testing.assert_close(found, expected[position], rtol=1e-4, atol=1e-4)


def test_warm_ups_do_not_change_a_step(model):
    ids = torch.tensor([[3, 14, 15, 9]])
    steps, other = GraphSteps(model, 8), GraphSteps(model, 8)
    for one in (steps, other):
        one.prefill(ids)
    with torch.inference_mode():
        other._position.fill_(4)
        for _ in range(2):
            other._run()
            other._rewind(4)
    assert torch.equal(steps(7, 4), other(7, 4))


def test_every_step_runs_the_same_operations_without_waiting_for_the_device(model):
    steps = GraphSteps(model, 12)
    steps.prefill(torch.tensor([[3, 14, 15, 9]]))
    lists = []
    for position in (4, 5, 6):
        with torch.inference_mode():
            steps._position.fill_(position)
            with Launches() as launches:
                steps._run()
        lists.append(launches.names)
    assert len(lists[0]) > 50
    assert lists[0] == lists[1] == lists[2]
    waits = ("_local_scalar_dense", "nonzero", "item", "_to_cpu")
    assert [name for name in lists[0] if any(wait in name for wait in waits)] == []


def test_greedy_decoding_is_the_same_as_single_steps(model):
    prompt = torch.tensor([[3, 14, 15]])
    steps, other = GraphSteps(model, 12), GraphSteps(model, 12)
    token, expected = int(steps.prefill(prompt).argmax()), []
    other.prefill(prompt)
    found = list(other.decode_greedily(token, 6))
    for position in range(3, 9):
        token = int(steps(token, position).argmax())
        expected.append(token)
    assert found == expected
    with pytest.raises(ConfigError, match="generate 4 tokens after 9: the capacity is 12"):
        next(other.decode_greedily(token, 4))


def test_positions_must_follow_and_fit(model):
    steps = GraphSteps(model, 3)
    with pytest.raises(ConfigError, match="position 0: the next position is 0 of 3"):
        steps(1, 0)
    steps.prefill(torch.tensor([[3, 14]]))
    with pytest.raises(ConfigError, match="position 5: the next position is 2 of 3"):
        steps(1, 5)
    steps(1, 2)
    with pytest.raises(ConfigError, match="position 3: the next position is 3 of 3"):
        steps(1, 3)
    with pytest.raises(ConfigError, match=r"1 x 4 tokens; allowed: 1 x 1..3"):
        steps.prefill(torch.ones(1, 4, dtype=torch.int64))


def test_obstacles_to_capture_are_named(model):
    assert find_cache_obstacle(model) is None
    assert find_obstacle(model) == "it is on cpu, not on one CUDA device"
    windowed = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16))
    assert "StaticSlidingWindowLayer" in find_cache_obstacle(windowed)
    assert find_cache_obstacle(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2))) is None
