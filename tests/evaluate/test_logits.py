import math

import pytest
import torch

from halfbyte.errors import ConfigError
from halfbyte.evaluate import logits as logits_module
from halfbyte.evaluate.logits import compare_logits, measure_nll


def naive(base, quantized, targets):
    """Plain float64, one token at a time."""
    rows = []
    for p_logits, q_logits, target in zip(base, quantized, targets.tolist(), strict=True):
        p = torch.softmax(p_logits.double(), 0)
        q = torch.softmax(q_logits.double(), 0)
        kl = float(torch.where(p > 0, p * (p / q).log(), 0.0).sum())
        same = int(p_logits.argmax()) == int(q_logits.argmax())
        rows.append((kl, same, -math.log(p[target]), -math.log(q[target])))
    return rows


def random_case(tokens, vocabulary, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(tokens, vocabulary, generator=generator) * 4
    quantized = base + torch.randn(tokens, vocabulary, generator=generator)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return base.to(dtype), quantized.to(dtype), targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_values", [1, 100, 10**9])
def test_comparison_matches_naive_float64(monkeypatch, dtype, chunk_values):
    monkeypatch.setattr(logits_module, "CHUNK_VALUES", chunk_values)
    base, quantized, targets = random_case(13, 37, dtype)
    result = compare_logits(base, quantized, targets)
    kl, agrees, base_nll, quantized_nll = zip(*naive(base, quantized, targets), strict=True)
    assert result.kl_nats.tolist() == pytest.approx(kl, rel=1e-5, abs=1e-6)
    assert result.agrees.tolist() == list(agrees)
    assert 0 < sum(agrees) < 13
    assert result.base_nll_nats.tolist() == pytest.approx(base_nll, rel=1e-5, abs=1e-6)
    assert result.quantized_nll_nats.tolist() == pytest.approx(quantized_nll, rel=1e-5, abs=1e-6)
    assert measure_nll(base, targets).tolist() == pytest.approx(base_nll, rel=1e-5, abs=1e-6)


def test_inputs_are_left_unchanged():
    base, quantized, targets = random_case(5, 11)
    copies = base.clone(), quantized.clone()
    compare_logits(base, quantized, targets)
    measure_nll(base, targets)
    assert torch.equal(base, copies[0])
    assert torch.equal(quantized, copies[1])


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[3e4, 0.0, -3e4]])
    assert measure_nll(logits, torch.tensor([1])).tolist() == [3e4]
    assert float(compare_logits(logits, logits, torch.tensor([0])).kl_nats) == 0.0


def test_token_with_probability_zero_in_both_adds_nothing():
    logits = torch.tensor([[1.0, 2.0, -math.inf]])
    assert float(compare_logits(logits, logits, torch.tensor([0])).kl_nats) == 0.0


def test_token_with_probability_zero_in_the_quantized_model_gives_infinite_kl():
    base = torch.tensor([[1.0, 2.0, 0.0]])
    quantized = torch.tensor([[1.0, 2.0, -math.inf]])
    assert float(compare_logits(base, quantized, torch.tensor([0])).kl_nats) == math.inf


def test_different_vocabularies_are_rejected():
    with pytest.raises(ConfigError, match=r"\[4, 10\] \(base\) with \[4, 12\] \(quantized\)"):
        compare_logits(torch.zeros(4, 10), torch.zeros(4, 12), torch.zeros(4, dtype=torch.long))


def test_targets_must_fit_the_logits():
    with pytest.raises(ConfigError, match=r"shape \[4, 10\] against target ids of shape \[3\]"):
        measure_nll(torch.zeros(4, 10), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("bad", [-1, 10])
def test_target_outside_the_vocabulary_is_rejected(bad):
    with pytest.raises(ConfigError, match=f"token id {bad}: the model's vocabulary is 0..9"):
        measure_nll(torch.zeros(2, 10), torch.tensor([3, bad]))
