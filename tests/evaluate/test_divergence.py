import json
import math

import numpy as np
import pytest
import torch

from halfbyte.errors import ConfigError, ModelError
from halfbyte.evaluate.divergence import DivergenceAccumulator, divergence, percentiles
from halfbyte.evaluate.perplexity import perplexity
from halfbyte.evaluate.windows import tokenize_text


@pytest.fixture
def quantized(make_model):
    """The base with its weights moved a little."""
    moved = make_model()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.03
    return moved


def naive_divergence(base, quantized, ids, window):
    """Float64: KL and agreement of every token, window by window."""
    kl, agrees = [], []
    for part in ids[: len(ids) // window * window].split(window):
        with torch.no_grad():
            p = base(input_ids=part[None]).logits[0, :-1].double().log_softmax(-1)
            q = quantized(input_ids=part[None]).logits[0, :-1].double().log_softmax(-1)
        kl.append([float((p[i].exp() * (p[i] - q[i])).sum()) for i in range(window - 1)])
        agrees.append([int(p[i].argmax() == q[i].argmax()) for i in range(window - 1)])
    return np.array(kl), np.array(agrees)


def test_model_does_not_diverge_from_itself(model, make_model, tokenizer, text):
    result = divergence(model, make_model(), text, tokenizer=tokenizer, window=16)
    assert result.kl_nats == pytest.approx(0, abs=1e-6)
    assert result.kl_percentiles["100"] == pytest.approx(0, abs=1e-6)
    assert result.top1_agreement == 1.0
    assert result.perplexity_ratio == 1.0


def test_matches_naive_float64(model, quantized, tokenizer, text):
    result = divergence(model, quantized, text, tokenizer=tokenizer, window=16)
    kl, agrees = naive_divergence(model, quantized, tokenize_text(tokenizer, text), 16)
    assert result.kl_nats == pytest.approx(kl.mean(), rel=1e-4)
    spread = kl.mean(axis=1).std(ddof=1) / math.sqrt(len(kl))
    assert result.kl_standard_error == pytest.approx(spread, rel=1e-3)
    assert result.top1_agreement == pytest.approx(agrees.mean())
    assert 0.2 < result.top1_agreement < 1.0
    for name, value in result.kl_percentiles.items():
        assert value == pytest.approx(np.percentile(kl, float(name)), rel=1e-3)
    assert (result.num_windows, result.num_tokens, result.window) == (6, 90, 16)


def test_perplexities_equal_those_measured_separately(model, quantized, tokenizer, text):
    result = divergence(model, quantized, text, tokenizer=tokenizer, window=16)
    for one, alone in ((result.base, model), (result.quantized, quantized)):
        expected = perplexity(alone, text, tokenizer=tokenizer, window=16)
        assert one.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
        assert one.standard_error == pytest.approx(expected.standard_error, rel=1e-4)
    assert result.perplexity_ratio == pytest.approx(
        result.quantized.perplexity / result.base.perplexity
    )


def test_increase_is_paired_by_window():
    accumulator = DivergenceAccumulator()
    generator = torch.Generator().manual_seed(0)
    # Windows that differ a lot from each other, and one constant loss of likelihood in each.
    for sharpness in (1.0, 5.0, 20.0):
        base = torch.randn(40, 30, generator=generator) * sharpness
        accumulator.update(base, base.clone(), base.argmax(dim=1) * 0)
    result = accumulator.result()
    assert result.base.nll_standard_error > 1
    assert result.nll_increase_nats == 0
    assert result.nll_increase_standard_error == 0


@pytest.mark.parametrize("batch_size", [2, 100])
def test_batch_size_does_not_change_the_result(model, quantized, tokenizer, text, batch_size):
    one = divergence(model, quantized, text, tokenizer=tokenizer, window=16)
    many = divergence(model, quantized, text, tokenizer=tokenizer, window=16, batch_size=batch_size)
    assert many.kl_nats == pytest.approx(one.kl_nats, rel=1e-4)
    assert many.top1_agreement == one.top1_agreement
    assert many.num_windows == one.num_windows


def test_folders_give_what_loaded_models_give(tmp_path, folder, model, quantized, tokenizer, text):
    other = tmp_path / "quantized"
    quantized.save_pretrained(other)
    tokenizer.save_pretrained(other)
    expected = divergence(model, quantized, text, tokenizer=tokenizer, window=16)
    result = divergence(folder, other, text, window=16)
    assert result.kl_nats == pytest.approx(expected.kl_nats, rel=1e-5)
    assert (result.base.dtype, result.quantized.dtype) == ("float32", "float32")


def test_result_can_be_written_as_json(model, quantized, tokenizer, text):
    result = divergence(model, quantized, text, tokenizer=tokenizer, window=16)
    values = json.loads(json.dumps(result.to_dict()))
    assert values["kl_percentiles"].keys() == {"50", "90", "95", "99", "99.9", "100"}
    assert values["base"]["num_windows"] == 6
    assert values["perplexity_ratio"] == result.perplexity_ratio


def test_different_tokenizers_are_rejected(tmp_path, folder, quantized, make_tokenizer):
    other = tmp_path / "other"
    quantized.save_pretrained(other)
    make_tokenizer(shift=1).save_pretrained(other)
    with pytest.raises(ConfigError, match=r"give 3 and 3 tokens .* differ from token 1 on"):
        divergence(folder, other, "? w4 w5", window=2)


def test_quantized_folder_without_a_tokenizer_uses_the_bases(tmp_path, folder, quantized, text):
    other = tmp_path / "other"
    quantized.save_pretrained(other)
    assert divergence(folder, other, text, window=16).num_windows == 6


def test_different_vocabularies_are_rejected(model, make_model, tokenizer, text):
    padded = make_model(vocabulary=72)
    with pytest.raises(ConfigError, match=r"\[1, 15, 64\] \(base\) with \[1, 15, 72\]"):
        divergence(model, padded, text, tokenizer=tokenizer, window=16)


def test_window_must_fit_both_models(model, make_model, tokenizer, text):
    short = make_model(longest=32)
    assert divergence(model, short, text, tokenizer=tokenizer).window == 32
    with pytest.raises(ConfigError, match="windows of 64 tokens: it takes at most 32"):
        divergence(model, short, text, tokenizer=tokenizer, window=64)


def test_result_without_a_window_is_an_error():
    with pytest.raises(ModelError, match="no window was measured"):
        DivergenceAccumulator().result()


def test_nan_logits_are_rejected(model):
    accumulator = DivergenceAccumulator()
    bad = torch.zeros(3, 5)
    bad[2] = math.nan
    with pytest.raises(ModelError, match=r"window 0: .* 1 of 3 positions, first at position 2"):
        accumulator.update(torch.zeros(3, 5), bad, torch.zeros(3, dtype=torch.long))


def test_percentiles_match_numpy():
    values = torch.rand(1001, generator=torch.Generator().manual_seed(1))
    for name, value in percentiles(values).items():
        assert value == pytest.approx(np.percentile(values.double().numpy(), float(name)))
    assert percentiles(torch.tensor([2.0]))["99.9"] == 2.0
