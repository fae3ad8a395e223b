from __future__ import annotations

import pytest
import torch
from tests.helpers.checkpoints import Recipe, tiny_llama_config, write_checkpoint
from tests.helpers.tiny_llama import build_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import halfbyte
from halfbyte.errors import ConfigError
from halfbyte.integrations import generation
from halfbyte.integrations.generation import Generator, Sampling, TextStream, Timing, encode_chat
from halfbyte.kernels.native_library import open_library
from halfbyte.nn.gpu_step import NotCapturable

PROMPT = [1, 17, 40, 99, 3]
LIBRARY = open_library()


@pytest.fixture
def model(tmp_path):
    # Weights large enough that logits are far apart: rounding must not decide.
    write_checkpoint(tmp_path, tiny_llama_config(initializer_range=0.5), Recipe())
    return halfbyte.load(tmp_path, dtype=torch.float32)


def transformers_answer(model, count):
    ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=count, do_sample=False)
    return ids[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("native", [True, False])
def test_greedy_text_is_that_of_transformers(model, native):
    expected = transformers_answer(model, 40)
    timing = Timing(prompt_tokens=len(PROMPT))
    found = list(
        Generator(model, native=native).stream(PROMPT, Sampling(max_new_tokens=40), timing)
    )
    assert found == [token for token in expected if token != 2]
    assert timing.rate > 0
    assert timing.prompt_rate > 0
    assert len(timing.step_seconds) >= len(found) - 1


def test_recorded_steps_give_the_same_text_and_room_for_longer_ones(model, monkeypatch):
    # Without a GPU nothing is recorded; the same steps run over the same cache.
    expected = transformers_answer(model, 40)
    monkeypatch.setattr(generation.graph_steps, "find_obstacle", lambda model: None)
    monkeypatch.setattr(generation, "find_obstacle", lambda model: "not on a GPU")
    monkeypatch.setattr(generation, "ROOM_STEP", 16)
    generator = Generator(model)
    for count in (5, 40, 20):
        found = list(generator.stream(PROMPT, Sampling(max_new_tokens=count)))
        assert found == [token for token in expected[:count] if token != 2]
    assert generator.describe_decoding().startswith(
        "one CUDA graph per token of Transformers' forward"
    )


def test_steps_that_cannot_be_recorded_are_run_by_transformers(model, monkeypatch):
    expected = transformers_answer(model, 20)
    monkeypatch.setattr(generation.graph_steps, "find_obstacle", lambda model: None)
    monkeypatch.setattr(generation, "find_obstacle", lambda model: "not on a GPU")

    def refuse(self, prompt):
        raise NotCapturable("its forward waits for the GPU")

    monkeypatch.setattr(generation.GraphSteps, "prefill", refuse)
    generator = Generator(model)
    found = list(generator.stream(PROMPT, Sampling(max_new_tokens=20)))
    assert found == [token for token in expected if token != 2]
    assert generator.graph_obstacle == "its forward waits for the GPU"


def test_stops_before_the_end_of_text_token(model):
    third = transformers_answer(model, 3)[2]
    generator = Generator(model)
    generator.ends = frozenset([third])
    assert third not in list(generator.stream(PROMPT, Sampling(max_new_tokens=40)))


def test_the_same_seed_draws_the_same_and_another_does_not(model):
    generator = Generator(model)

    def draw(seed):
        settings = Sampling(max_new_tokens=30, temperature=5.0, seed=seed)
        return list(generator.stream(PROMPT, settings))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_small_top_p_leaves_the_likeliest_token_only(model):
    generator = Generator(model)
    generator.ends = frozenset()
    greedy = list(generator.stream(PROMPT, Sampling(max_new_tokens=20)))
    nearly = Sampling(max_new_tokens=20, temperature=1.0, top_p=1e-6)
    assert list(generator.stream(PROMPT, nearly)) == greedy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be at least 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**change)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(ConfigError, match="The prompt is empty"):
        next(Generator(model).stream([], Sampling()))


def test_a_rounded_head_needs_the_compiled_decoder(model):
    with pytest.raises(ConfigError, match="A head of 8 bits needs the compiled decoder, which can"):
        Generator(model, head_bits=8, native=False)


@pytest.mark.native
@pytest.mark.skipif(LIBRARY.functions is None, reason=str(LIBRARY.obstacle))
def test_a_head_of_8_bits_says_nearly_the_same(model):
    exact, rounded = Generator(model), Generator(model, head_bits=8)
    hidden = torch.randn(64)
    difference = exact.head(hidden) - rounded.head(hidden)
    assert 0 < float(difference.norm() / exact.head(hidden).norm()) < 0.02


def test_text_comes_whole_characters_at_a_time():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    text = "naïve 東京\n  x"
    stream = TextStream(fast)
    pieces = [stream.add(token) for token in fast(text)["input_ids"]]
    assert "".join(pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_a_conversation_needs_a_chat_template():
    tokenizer = build_tokenizer()
    with pytest.raises(ConfigError, match="no chat template"):
        encode_chat(tokenizer, [{"role": "user", "content": "w1"}])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}w9{% endif %}"
    )
    ids = encode_chat(tokenizer, [{"role": "w3", "content": "w1 w2"}])
    assert ids == tokenizer("w3 w1 w2 w9", add_special_tokens=False)["input_ids"]


def test_text_of_a_tokenizer_that_transformers_cleans_up_is_cleaned_up():
    words = ["[UNK]", "it", "##s", "is", "fine", ".", "n", "'", "t"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True)
    ids = [1, 2, 4, 5]
    assert fast.decode(ids) == "its fine."
    stream = TextStream(fast)
    assert "".join(stream.add(token) for token in ids) + stream.finish() == "its fine."
    assert TextStream(fast).add(1) == "it"
