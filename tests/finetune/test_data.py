from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers.tiny_llama import build_model, build_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from halfbyte.errors import DataError
from halfbyte.finetune.data import (
    IGNORED,
    Example,
    Examples,
    collate,
    pack,
    read_examples,
    split_examples,
)

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
WORDS = {f"w{i}": 4 + i for i in range(60)}
END = 2


def words_of(ids, tokenizer):
    return tokenizer.convert_ids_to_tokens(list(ids))


def counted(example, tokenizer):
    return words_of([label for label in example.labels if label != IGNORED], tokenizer)


@pytest.fixture
def tokenizer():
    made = build_tokenizer()
    made.chat_template = TEMPLATE
    return made


def read(tmp_path, tokenizer, *rows, length=64, everything=False):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return read_examples(path, tokenizer, length=length, everything=everything)


def chat(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def test_prompt_is_masked_and_the_completion_with_its_end_is_not(tmp_path, tokenizer):
    row = {"prompt": "w1 w2 ", "completion": "w3 w4"}
    (example,) = read(tmp_path, tokenizer, row).examples
    assert example.ids == (5, 6, 7, 8, END)
    assert example.labels == (IGNORED, IGNORED, 7, 8, END)


@pytest.fixture(params=["spaces in places", "spaces left out of places"])
def bytes_tokenizer(request):
    """Byte-level pairs whose tokens begin with a space, as GPT-2's, Llama 3's and Qwen's do.

    GPT-NeoX's tell of places without it.
    """
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["capital of France: Paris is it: Paris"] * 9, trainer)
    trim = request.param == "spaces left out of places"
    made.post_processor = processors.ByteLevel(trim_offsets=trim)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


@pytest.mark.parametrize(
    ("prompt", "completion", "words", "joined"),
    [
        ("capital of France:", " Paris is", ["ĠParis", "Ġis", "</s>"], False),
        # Counted by where it begins, the answer would have lost its only word.
        ("capital of France: ", "Paris", ["ĠParis", "</s>"], True),
        ("capital of Fra", "nce:", ["ĠFrance", ":", "</s>"], True),
        ("capital of", "", ["</s>"], False),
        # A token of nothing but space is learned too.
        ("capital of:", "  Paris", ["Ġ", "ĠParis", "</s>"], False),
    ],
)
def test_token_across_the_border_counts_and_is_noted(
    tmp_path, bytes_tokenizer, prompt, completion, words, joined
):
    found = read(tmp_path, bytes_tokenizer, {"prompt": prompt, "completion": completion})
    assert counted(found.examples[0], bytes_tokenizer) == words
    told = "in 1 of 1 examples the answer's first token begins in the prompt"
    assert [note[: len(told)] for note in found.notes] == [told] * joined
    whole = read(tmp_path, bytes_tokenizer, {"text": prompt + completion})
    assert whole.notes == ()


def test_everything_counts_on_request(tmp_path, tokenizer):
    row = {"prompt": "w1 w2 ", "completion": "w3 w4"}
    (example,) = read(tmp_path, tokenizer, row, everything=True).examples
    assert example.labels == example.ids


def test_text_counts_as_a_whole(tmp_path, tokenizer):
    (example,) = read(tmp_path, tokenizer, {"text": "w1 w2"}).examples
    assert example.labels == example.ids == (5, 6, END)


def test_chat_counts_what_the_assistant_says_and_that_it_stops(tmp_path, tokenizer):
    row = {"messages": chat("w1", "w2 w3", "w4", "w5")}
    (example,) = read(tmp_path, tokenizer, row).examples
    assert counted(example, tokenizer) == ["w2", "w3", "</s>", "w5", "</s>"]


def test_prompt_and_completion_may_be_messages_and_only_the_completion_counts(tmp_path, tokenizer):
    row = {"prompt": chat("w1", "w2", "w4"), "completion": [{"role": "assistant", "content": "w5"}]}
    (example,) = read(tmp_path, tokenizer, row).examples
    assert counted(example, tokenizer) == ["w5", "</s>"]


def test_template_that_rewrites_earlier_turns_is_refused(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last %}{{ m['content'] }} {% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"line 1: the chat template writes message 2 differently"):
        read(tmp_path, tokenizer, {"messages": chat("w1", "w2", "w3", "w4")})


def test_long_examples_are_cut_and_those_without_an_answer_left_out(tmp_path, tokenizer):
    rows = [
        {"prompt": "w1 w2 w3 w4 ", "completion": "w5"},
        {"prompt": "w1 ", "completion": "w2 w3 w4 w5"},
        {"prompt": "w1 ", "completion": "w2"},
    ]
    found = read(tmp_path, tokenizer, *rows, length=4)
    assert [len(example.ids) for example in found.examples] == [4, 3]
    assert found.notes == (
        "2 of 3 examples truncated to 4 tokens",
        "1 of 3 examples left out: no counted token in their first 4 tokens",
    )
    assert (found.num_tokens, found.num_counted) == (7, 5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"data\.jsonl, line 1 is not JSON: .* column 2"),
        ("[1]", r"line 1 holds '\[1\]'\. Give one object per line, with 'messages'"),
        ({"question": "w1"}, r"line 1 has the keys 'question'\. Give an object"),
        ({"messages": [{"role": "user"}]}, "line 1 holds messages that the chat template"),
        ("", "is empty"),
        ('{"text": "w1 \\ud83d"}', r"data\.jsonl, line 1 holds half a character, '\\ud83d': "),
        (
            {"messages": chat("w1")},
            "holds 1 examples, and none has a counted token within its first 64",
        ),
    ],
)
def test_bad_lines_are_refused_by_number(tmp_path, tokenizer, row, message):
    tokenizer.chat_template = TEMPLATE.replace(
        "m['content']", "raise_exception('x') if false else m.content + ''"
    )
    with pytest.raises(DataError, match=message):
        read(tmp_path, tokenizer, row)


def test_chat_without_a_template_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"line 1 is a chat, and the tokenizer has no chat template"
    ):
        read(tmp_path, build_tokenizer(), {"messages": chat("w1", "w2")})


def test_missing_file_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"Cannot read the data .*: No such file"):
        read_examples(tmp_path / "none", tokenizer, length=8, everything=False)


def examples_of(*sizes):
    return Examples(
        examples=tuple(
            Example((size, *[9] * (size - 1)), (size, *[9] * (size - 1))) for size in sizes
        ),
        notes=(),
    )


def test_split_is_the_same_each_time_and_keeps_equal_examples_together():
    examples = examples_of(*range(2, 22), *range(2, 22))
    one, apart = split_examples(examples, 0.25, seed=1)
    assert len(apart.examples) == 2 * 5
    assert {e.digest for e in one.examples}.isdisjoint(e.digest for e in apart.examples)
    again = split_examples(examples, 0.25, seed=1)
    assert again[1] == apart
    assert split_examples(examples, 0.25, seed=2)[1] != apart


def test_split_of_too_few_is_refused():
    with pytest.raises(DataError, match=r"hold out 10% of the data: it has 1 distinct"):
        split_examples(examples_of(3, 3), 0.1, seed=0)
    assert split_examples(examples_of(3, 3), 0, seed=0) == (examples_of(3, 3), None)


@given(st.lists(st.integers(2, 16), min_size=1, max_size=30))
def test_packing_loses_nothing_and_overfills_nothing(sizes):
    examples = examples_of(*sizes).examples
    rows = pack(examples, 16)
    assert sorted(len(e.ids) for row in rows for e in row) == sorted(sizes)
    assert all(sum(len(e.ids) for e in row) <= 16 for row in rows)
    # First fit: no two rows could be one.
    loads = sorted(sum(len(e.ids) for e in row) for row in rows)
    assert len(rows) == 1 or loads[0] + loads[1] > 16


@torch.no_grad()
def test_packed_examples_get_the_loss_that_they_get_alone():
    model = build_model()
    generator = torch.Generator().manual_seed(0)
    examples = []
    for size in (5, 9, 3, 7):
        ids = torch.randint(4, 60, (size,), generator=generator).tolist()
        examples.append(Example(tuple(ids), (IGNORED, IGNORED, *ids[2:])))
    packed = collate([examples[:2], examples[2:]], padding=3)
    assert set(packed) == {"input_ids", "labels", "position_ids"}
    counts = [len(e.ids) - 2 for e in examples]
    alone = [float(model(**collate([[e]], padding=3)).loss) for e in examples]
    expected = sum(loss * n for loss, n in zip(alone, counts, strict=True)) / sum(counts)
    assert float(model(**packed, use_cache=False).loss) == pytest.approx(expected, rel=1e-5)
    padded = collate([[e] for e in examples], padding=3)
    assert float(model(**padded).loss) == pytest.approx(expected, rel=1e-5)
