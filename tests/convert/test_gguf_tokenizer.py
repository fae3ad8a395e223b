from __future__ import annotations

import json

import pytest
from tests.helpers.conversions import TINY_CONFIG, write_tokenizer
from tokenizers import Tokenizer, models, normalizers, trainers

from halfbyte.convert.gguf_tokenizer import (
    describe_tokenizer,
    find_pre_tokenizer,
    list_tokenizer_limitations,
)
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.sample_model import write_sample_model


def test_pre_tokenizers_are_recognized_by_their_steps():
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
    whole_words = {"model": {"ignore_merges": True}}
    assert find_pre_tokenizer({"pre_tokenizer": steps, **whole_words}) == "llama-bpe"
    assert find_pre_tokenizer({"pre_tokenizer": steps}) == "dbrx"
    # OLMo 2, Granite 4.1, Phi-4: what the pattern finds is what is left.
    split |= {"behavior": "Removed", "invert": True}
    assert find_pre_tokenizer({"pre_tokenizer": steps}) == "dbrx"


def test_unknown_pre_tokenizer_is_refused_unless_named(tmp_path):
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"\(Whitespace\). Give it with --pre-tokenizer"):
        describe_tokenizer(tmp_path, TINY_CONFIG)
    assert describe_tokenizer(tmp_path, TINY_CONFIG, "tekken")["tokenizer.ggml.pre"] == "tekken"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_prefix_space": True}, r"\(ByteLevel\+regex with a space in front\)"),
        (
            {
                "type": "Split",
                "pattern": {"String": "a"},
                "behavior": "Removed",
                "invert": False,
            },
            r"\(Split a \(Removed",
        ),
    ],
)
def test_similar_pre_tokenizers_are_not_confused(tmp_path, changes, message):
    change_tokenizer(tmp_path, lambda content: content["pre_tokenizer"].update(changes))
    with pytest.raises(ConfigError, match=message):
        describe_tokenizer(tmp_path, TINY_CONFIG)


def test_normalizers_are_noted_or_refused(tmp_path):
    change_tokenizer(tmp_path, lambda content: content.update(normalizer={"type": "NFC"}))
    assert describe_tokenizer(tmp_path, TINY_CONFIG)["tokenizer.ggml.pre"] == "gpt-2"
    assert "normalizes Unicode (NFC)" in list_tokenizer_limitations(tmp_path, TINY_CONFIG)[0]
    steps = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    change_tokenizer(tmp_path, lambda content: content.update(normalizer=steps))
    with pytest.raises(ConfigError, match=r"the tokenizer normalizes text \(Lowercase\)"):
        describe_tokenizer(tmp_path, TINY_CONFIG, "gpt-2")


def test_invalid_tokenizer_files_are_refused(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: it is not valid JSON"):
        describe_tokenizer(tmp_path, TINY_CONFIG)
    (tmp_path / "tokenizer.json").write_text(pointer)
    with pytest.raises(ConfigError, match=r"tokenizer.json is not a valid tokenizer \(expected"):
        describe_tokenizer(tmp_path, TINY_CONFIG)
    change_tokenizer(tmp_path, lambda content: content["model"].update(merges=[]))
    with pytest.raises(ConfigError, match="the tokenizer has no merges"):
        describe_tokenizer(tmp_path, TINY_CONFIG)


def test_vocabulary_with_merges_is_bpe_without_a_type(tmp_path):
    change_tokenizer(tmp_path, lambda content: content["model"].pop("type"))
    assert describe_tokenizer(tmp_path, TINY_CONFIG)["tokenizer.ggml.model"] == "gpt2"


def change_tokenizer(folder, change):
    write_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("in_files", [False, True])
def test_every_chat_template_is_written(tmp_path, in_files):
    write_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    templates = {"default": "{{ a }}", "tool_use": "{{ b }}", "rag-2": "{{ c }}"}
    settings["chat_template"] = [
        {"name": name, "template": text} for name, text in templates.items()
    ]
    if in_files:
        settings["chat_template"] = "older"
        (tmp_path / "chat_template.jinja").write_text("{{ a }}")
        more = tmp_path / "additional_chat_templates"
        more.mkdir()
        (more / "tool_use.jinja").write_text("{{ b }}")
        (more / "rag-2.jinja").write_text("{{ c }}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    pairs = describe_tokenizer(tmp_path, TINY_CONFIG)
    found = {key: value for key, value in pairs.items() if "chat_template" in key}
    assert sorted(found.pop("tokenizer.chat_templates")) == ["rag_2", "tool_use"]
    assert found == {
        "tokenizer.chat_template": "{{ a }}",
        "tokenizer.chat_template.tool_use": "{{ b }}",
        "tokenizer.chat_template.rag_2": "{{ c }}",
    }


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="'the' has the id 259, but the model has only 250 tokens"):
        describe_tokenizer(tmp_path, {**TINY_CONFIG, "vocab_size": 250})


def test_added_tokens_beyond_the_vocabulary_are_left_out(tmp_path):
    image = {"id": 260, "content": "<image>", "special": True, "single_word": False}
    image |= {"lstrip": False, "rstrip": False, "normalized": False}
    change_tokenizer(tmp_path, lambda content: content["added_tokens"].append(image))
    config = {**TINY_CONFIG, "vocab_size": 260}
    assert len(describe_tokenizer(tmp_path, config)["tokenizer.ggml.tokens"]) == 260
    (note,) = list_tokenizer_limitations(tmp_path, config)
    assert note.startswith("left out of the tokenizer: <image>, with ids beyond the model's 260")
    assert list_tokenizer_limitations(tmp_path, {**config, "vocab_size": 261}) == ()


def test_ids_without_a_token_are_unused(tmp_path):
    write_tokenizer(tmp_path)
    pairs = describe_tokenizer(tmp_path, {**TINY_CONFIG, "vocab_size": 262})
    assert pairs["tokenizer.ggml.tokens"][260:] == ["[PAD260]", "[PAD261]"]
    assert pairs["tokenizer.ggml.token_type"][260:] == [5, 5]


def test_byte_fallback_gets_scores_in_merge_order(tmp_path):
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
