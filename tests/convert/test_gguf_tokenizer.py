from __future__ import annotations

import json

import pytest
from tests.helpers.conversions import TINY_CONFIG, write_tokenizer
from tokenizers import Tokenizer, models, normalizers, trainers

from halfbyte.convert.gguf_tokenizer import describe_tokenizer, find_pre_tokenizer
from halfbyte.sample_model import write_sample_model


def test_ways_of_cutting_words_are_known_by_their_steps():
    assert find_pre_tokenizer({"pre_tokenizer": {"type": "ByteLevel"}}) == "gpt-2"
    digits = {"type": "Digits", "individual_digits": True}
    steps = {"type": "Sequence", "pretokenizers": [digits, {"type": "ByteLevel"}]}
    assert find_pre_tokenizer({"pre_tokenizer": steps}) == "smollm"
    regex = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}
    steps = {
        "type": "Sequence",
        "pretokenizers": [split, {"type": "ByteLevel", "use_regex": False}],
    }
    assert find_pre_tokenizer({"pre_tokenizer": steps}) == "qwen2"
    split["pattern"]["Regex"] = regex.replace(r"\p{N}|", r"\p{N}{1,3}|")
    assert find_pre_tokenizer({"pre_tokenizer": steps}) == "llama-bpe"


def test_other_ways_are_refused_and_can_be_named(tmp_path):
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"\(Whitespace\). Give it with --pre-tokenizer"):
        describe_tokenizer(tmp_path, TINY_CONFIG)
    assert describe_tokenizer(tmp_path, TINY_CONFIG, "tekken")["tokenizer.ggml.pre"] == "tekken"


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="'the' has the id 259, and the model has 250 tokens"):
        describe_tokenizer(tmp_path, {**TINY_CONFIG, "vocab_size": 250})


def test_ids_without_a_token_are_unused(tmp_path):
    write_tokenizer(tmp_path)
    pairs = describe_tokenizer(tmp_path, {**TINY_CONFIG, "vocab_size": 262})
    assert pairs["tokenizer.ggml.tokens"][260:] == ["[PAD260]", "[PAD261]"]
    assert pairs["tokenizer.ggml.token_type"][260:] == [5, 5]


def test_byte_fallback_gets_scores_that_follow_the_merges(tmp_path):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special)
    tokenizer.train_from_iterator(["the cat then there the theme"] * 4, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    pairs = describe_tokenizer(tmp_path, {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2})
    tokens = pairs["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, pairs["tokenizer.ggml.scores"], strict=True))
    ranks = ["".join(pair) for pair in content["model"]["merges"]]
    assert [scores[text] for text in ranks] == [-float(rank) for rank in range(len(ranks))]
    assert pairs["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert pairs["tokenizer.ggml.model"] == "llama"
    assert pairs["tokenizer.ggml.add_space_prefix"]


@pytest.mark.slow
def test_the_sample_models_tokenizer_is_known(tmp_path):
    folder = write_sample_model(tmp_path / "sample").folder
    config = json.loads((folder / "config.json").read_text())
    pairs = describe_tokenizer(folder, config)
    assert pairs["tokenizer.ggml.pre"] == "smollm"
    assert len(pairs["tokenizer.ggml.tokens"]) == config["vocab_size"]
