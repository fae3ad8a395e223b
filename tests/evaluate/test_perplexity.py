import math
from types import SimpleNamespace

import pytest
import torch

from halfbyte.errors import ConfigError, ModelError
from halfbyte.evaluate.perplexity import PerplexityAccumulator, perplexity
from halfbyte.evaluate.windows import tokenize_text


class UniformModel(torch.nn.Module):
    """A model that gives every token the same probability."""

    def __init__(self, vocabulary):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, 1)
        text_config = SimpleNamespace(vocab_size=vocabulary, max_position_embeddings=None)
        self.config = SimpleNamespace(get_text_config=lambda: text_config)
        self.dtype = torch.float32

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache):
        logits = torch.full((*input_ids.shape, self.embedding.num_embeddings), 3.7)
        return SimpleNamespace(logits=logits)


def naive_perplexity(model, ids, window):
    """Float64, one window and one token at a time."""
    means = []
    for start in range(0, len(ids) - window + 1, window):
        part = ids[start : start + window]
        with torch.no_grad():
            logits = model(input_ids=part[None]).logits[0].double()
        losses = [-float(torch.log_softmax(logits[i], 0)[part[i + 1]]) for i in range(window - 1)]
        means.append(sum(losses) / len(losses))
    mean = sum(means) / len(means)
    variance = sum((m - mean) ** 2 for m in means) / (len(means) - 1)
    return math.exp(mean), math.exp(mean) * math.sqrt(variance / len(means))


@pytest.mark.parametrize("vocabulary", [2, 1000, 49152])
def test_uniform_model_has_the_vocabulary_size_as_perplexity(vocabulary):
    result = perplexity(UniformModel(vocabulary), torch.arange(40) % vocabulary, window=10)
    assert result.perplexity == pytest.approx(vocabulary, rel=1e-6)
    assert result.standard_error == pytest.approx(0, abs=1e-3)
    assert (result.num_windows, result.num_tokens, result.window) == (4, 36, 10)


def test_matches_naive_float64(model, tokenizer, text):
    result = perplexity(model, text, tokenizer=tokenizer, window=16)
    expected, error = naive_perplexity(model, tokenize_text(tokenizer, text), 16)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert result.standard_error == pytest.approx(error, rel=1e-4)
    assert math.log(result.perplexity) == pytest.approx(result.nll_nats)
    assert result.num_windows == 6


@pytest.mark.parametrize("batch_size", [2, 4, 100])
def test_batch_size_does_not_change_the_result(model, tokenizer, text, batch_size):
    one = perplexity(model, text, tokenizer=tokenizer, window=16)
    many = perplexity(model, text, tokenizer=tokenizer, window=16, batch_size=batch_size)
    assert many.perplexity == pytest.approx(one.perplexity, rel=1e-6)
    assert many.standard_error == pytest.approx(one.standard_error, rel=1e-4)
    assert many.num_windows == one.num_windows


def test_folder_gives_what_the_loaded_model_gives(folder, model, tokenizer, text):
    from_folder = perplexity(folder, text, window=16)
    assert from_folder == perplexity(model, text, tokenizer=tokenizer, window=16)
    assert from_folder.dtype == "float32"
    assert perplexity(str(folder), text, window=16, dtype="bfloat16").dtype == "bfloat16"


def test_ids_need_no_tokenizer(model, tokenizer, text):
    ids = tokenize_text(tokenizer, text)
    assert perplexity(model, ids.tolist(), window=16) == perplexity(model, ids, window=16)


def test_bos_shifts_the_text_by_one(model, tokenizer, text):
    ids = torch.cat([torch.tensor([1]), tokenize_text(tokenizer, text)])
    with_bos = perplexity(model, text, tokenizer=tokenizer, window=16, add_bos=True)
    assert with_bos == perplexity(model, ids, window=16)


def test_default_window_is_at_most_the_context_length(model, text, tokenizer):
    result = perplexity(model, text + " " + text, tokenizer=tokenizer)
    assert (result.window, result.num_windows) == (128, 1)
    assert result.standard_error is None


def test_short_text_is_measured_with_a_note(model, tokenizer):
    result = perplexity(model, "w1 w2 w3", tokenizer=tokenizer, window=16)
    assert (result.num_tokens, result.window) == (2, 3)
    assert "3 tokens, less than one window of 16" in result.note


def test_progress_counts_windows(model, tokenizer, text):
    seen = []
    perplexity(
        model,
        text,
        tokenizer=tokenizer,
        window=16,
        windows=5,
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_window_beyond_the_context_length_is_rejected(model, tokenizer, text):
    with pytest.raises(ConfigError, match="windows of 256 tokens: it takes at most 128"):
        perplexity(model, text, tokenizer=tokenizer, window=256)


def test_ids_outside_the_vocabulary_are_rejected(model):
    with pytest.raises(ConfigError, match=r"token id 99; the model's vocabulary is 0\.\.63"):
        perplexity(model, [1, 2, 99, 4], window=4)


def test_empty_text_is_rejected(model, tokenizer):
    with pytest.raises(ConfigError, match="a text of 0 tokens"):
        perplexity(model, "", tokenizer=tokenizer)


def test_batch_size_of_zero_is_rejected(model):
    with pytest.raises(ConfigError, match="batch_size is 0; it must be 1 or more"):
        perplexity(model, [1, 2, 3, 4], batch_size=0)


def test_nan_logits_are_rejected_with_their_position():
    accumulator = PerplexityAccumulator()
    logits = torch.zeros(1, 6, 5)
    accumulator.update(logits, torch.ones(1, 6, dtype=torch.long))
    logits[0, 4, 2] = math.nan
    with pytest.raises(ModelError, match=r"window 1: .* at 1 of 6 positions, first at position 4"):
        accumulator.update(logits, torch.ones(1, 6, dtype=torch.long))


def test_result_without_a_window_is_an_error():
    with pytest.raises(ModelError, match="no window was measured"):
        PerplexityAccumulator().result()


def test_infinite_likelihood_gives_infinite_perplexity():
    accumulator = PerplexityAccumulator()
    accumulator.add_nll(torch.tensor([1e30]))
    assert accumulator.result().perplexity == math.inf
