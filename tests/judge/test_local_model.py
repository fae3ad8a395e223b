"""Answers compared with plain forward passes of one question, without padding or KV cache."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tests.helpers.tiny_llama import build_model, build_tokenizer
from torch.nn import functional

from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.evaluate.loading import Subject
from halfbyte.judge.answers import Answer, AnswerFile
from halfbyte.judge.local_model import LocalModel, cut_at, unpack_reference_linears
from halfbyte.judge.model_cache import ModelCache
from halfbyte.judge.questions import Question, make_question
from halfbyte.judge.tasks import Item


@pytest.fixture
def model():
    return LocalModel(Subject(name="m", model=build_model(), tokenizer=build_tokenizer()))


def questions(words, **more):
    tokenizer = build_tokenizer()
    return [
        make_question(tokenizer, Item(name=f"q{n}", prompt=words(n), **more)) for n in (3, 9, 6, 9)
    ]


@torch.inference_mode()
def naive_nats(model, ids, choice):
    logits = model(torch.tensor([[*ids, *choice]])).logits[0].double().log_softmax(dim=1)
    return sum(float(logits[len(ids) + i - 1, token]) for i, token in enumerate(choice))


def test_choice_likelihoods_equal_those_of_whole_sequences(model, words):
    asked = questions(words, choices=(" w1", " w2 w3 w4", " w5 w6"))
    for question, answer in zip(asked, model.answer_choices(asked), strict=True):
        expected = [naive_nats(model.model, question.ids, c) for c in question.choices]
        assert answer.choice_nats == pytest.approx(expected, abs=1e-4)
        assert answer.finite


@torch.inference_mode()
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_confidence_equals_that_of_plain_forward_passes(model, words, temperature):
    asked = questions(words, max_new_tokens=7)
    for question, answer in zip(
        asked, model.write(asked, temperature=temperature, seed=3), strict=True
    ):
        assert len(answer.logprobs) == len(answer.entropies) > 0
        for n in range(len(answer.logprobs)):
            ids = torch.tensor([[*question.ids, *answer.ids[:n]]])
            step = model.model(ids).logits[0, -1].double().log_softmax(dim=0)
            assert answer.logprobs[n] == pytest.approx(float(step[answer.ids[n]]), abs=2e-4)
            entropy = float(-(step.exp() * step).sum())
            assert answer.entropies[n] == pytest.approx(entropy, abs=2e-4)


def test_questions_with_different_numbers_of_choices_share_a_batch(model, words):
    tokenizer = build_tokenizer()
    asked = [
        make_question(tokenizer, Item(name="a", prompt=words(4), choices=(" w1 w2", " w3"))),
        make_question(
            tokenizer, Item(name="b", prompt=words(4), choices=(" w1", " w2", " w3 w4 w5"))
        ),
    ]
    answers = model.answer_choices(asked)
    for question, answer in zip(asked, answers, strict=True):
        expected = [naive_nats(model.model, question.ids, c) for c in question.choices]
        assert answer.choice_nats == pytest.approx(expected, abs=1e-4)


@torch.inference_mode()
def naive_greedy(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return ids


def test_generated_tokens_equal_those_of_a_plain_loop(model, words):
    asked = questions(words, max_new_tokens=7)
    for question, answer in zip(asked, model.write(asked), strict=True):
        expected = naive_greedy(model.model, question.ids, 7)[len(question.ids) :]
        assert list(answer.ids) == expected


def test_generation_ends_at_the_stop_sequence_and_at_each_items_limit(model, words):
    (question,) = questions(words, max_new_tokens=6)[:1]
    (whole,) = model.write([question])
    word = whole.text.split()[2]
    stopped = Question(
        item=Item(name="s", prompt="x", max_new_tokens=6, stop=(word,)), ids=question.ids
    )
    short = Question(item=Item(name="t", prompt="x", max_new_tokens=2), ids=question.ids)
    first, second = model.write([stopped, short])
    assert first.text == cut_at(whole.text, [word])
    assert second.ids == whole.ids[:2]
    assert cut_at("a\nb;c", ["\n", ";"]) == "a"


def test_stop_sequence_applies_whatever_else_is_in_the_batch(model, words):
    model.subject.tokenizer.pad_token = "<pad>"
    tokenizer = model.subject.tokenizer
    asked = [
        make_question(tokenizer, Item(name=f"q{n}", prompt=words(4), max_new_tokens=24))
        for n in range(8)
    ]
    free = model.write(asked)
    longest = max(range(8), key=lambda n: len(free[n].ids))
    short = next(n for n in range(8) if n != longest and len(free[n].text.split()) > 4)
    stop = (free[short].text.split()[2],)
    stopped = make_question(tokenizer, dataclasses.replace(asked[short].item, stop=stop))
    (alone,) = model.write([stopped])
    beside, _ = model.write([stopped, asked[longest]])
    assert len(beside.ids) == len(beside.logprobs) < 4
    assert (beside.text, beside.ids) == (alone.text, alone.ids)
    assert beside.logprobs == pytest.approx(alone.logprobs, abs=2e-4)


@pytest.mark.parametrize(
    "own", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 1}, {"num_beams": 3}]
)
def test_generation_config_of_the_model_does_not_affect_greedy_answers(model, words, own):
    asked = questions(words, max_new_tokens=20)
    plain = model.write(asked)
    for name, value in own.items():
        setattr(model.model.generation_config, name, value)
    kept = model.model.generation_config
    assert model.write(asked) == plain
    assert all(answer.finite for answer in plain)
    assert model.model.generation_config is kept


def test_sampling_is_reproducible_and_does_not_advance_the_global_generator(model, words):
    (question,) = questions(words, max_new_tokens=8)[:1]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draws = [model.write([question], temperature=1.5, seed=s)[0].ids for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(before, torch.get_rng_state())


def test_nonfinite_logits_are_detected_everywhere(words):
    broken = build_model()
    with torch.no_grad():
        broken.lm_head.weight[7] = float("nan")
    model = LocalModel(Subject(name="m", model=broken, tokenizer=build_tokenizer()))
    assert not any(a.finite for a in model.write(questions(words, max_new_tokens=3)))
    asked = questions(words, choices=(" w1", " w2 w3"))
    assert not any(a.finite for a in model.answer_choices(asked))
    assert not model.predict([asked[0].ids])[0].finite


def test_saved_states_reproduce_the_logits(model, words, tmp_path):
    ids = questions(words)[1].ids
    prediction = model.predict([ids])[0]
    assert not prediction.are_logits
    assert prediction.states.shape == (len(ids), 32)
    cache = ModelCache(tmp_path, "m")
    cache.save_states("key", prediction)
    cache.save_head(model)
    again = ModelCache(tmp_path, "m").load_logits("key")
    assert torch.allclose(again, prediction.logits, atol=1e-5)
    last = model.predict([ids], last=2)[0]
    assert torch.allclose(last.logits, prediction.logits[-2:], atol=1e-5)


def test_quantized_head_is_saved_dequantized(words, tmp_path):
    from tests.helpers.checkpoints import Recipe, tiny_llama_config, write_checkpoint

    from halfbyte.evaluate.loading import open_subject

    recipe = Recipe(group_size=32, skip="none", labels={"lm_head": True})
    write_checkpoint(tmp_path / "q", tiny_llama_config(tie_word_embeddings=False), recipe)
    model = LocalModel(open_subject(tmp_path / "q", dtype="float32"))
    prediction = model.predict([questions(words)[1].ids])[0]
    cache = ModelCache(tmp_path, "m")
    cache.save_states("key", prediction)
    cache.save_head(model)
    assert not prediction.are_logits
    assert torch.allclose(cache.load_logits("key"), prediction.logits, atol=1e-5)


def test_cache_path_that_is_a_file_is_rejected(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"Cannot create a cache in '.*file': Not a directory"):
        ModelCache(tmp_path / "file", "m")


def test_logits_are_saved_if_the_head_alone_does_not_give_them(words, tmp_path):
    bent = build_model()
    plain = bent.forward

    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output

    bent.forward = forward
    model = LocalModel(Subject(name="m", model=bent, tokenizer=build_tokenizer()))
    prediction = model.predict([questions(words)[0].ids])[0]
    assert prediction.are_logits
    cache = ModelCache(tmp_path, "m")
    cache.save_states("key", prediction)
    assert torch.equal(cache.load_logits("key"), prediction.logits)


def test_dequantized_linears_give_the_same_answers(tmp_path, monkeypatch):
    from tests.helpers.checkpoints import Recipe, tiny_llama_config, write_checkpoint

    from halfbyte.evaluate.loading import open_subject
    from halfbyte.kernels.cpu_native import CpuNative

    monkeypatch.setattr(CpuNative, "find_obstacle", lambda _: "not built on this machine")
    write_checkpoint(tmp_path, tiny_llama_config(), Recipe(bits=3, group_size=32))
    subject = open_subject(tmp_path, dtype="float32")
    ids = torch.arange(1, 20)[None]
    with torch.inference_mode():
        before = subject.model(ids).logits
        note = unpack_reference_linears(subject.model)
        after = subject.model(ids).logits
    assert "14 linears were dequantized once" in note
    assert torch.allclose(before, after, atol=1e-5)
    assert unpack_reference_linears(subject.model) is None
    monkeypatch.setenv("HALFBYTE_KERNEL", "torch_reference")
    forced = open_subject(tmp_path, dtype="float32")
    assert unpack_reference_linears(forced.model) is None


def test_answers_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    kept = AnswerFile(path)
    answer = Answer(choice_nats=(-1.5, -math.pi), text="ü\n", ids=(1, 2), finite=False)
    kept.add({"a": answer.to_dict()})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"v":2,"key":"b","va')
    again = AnswerFile(path)
    assert Answer.from_dict(again.get("a")) == answer
    assert "b" not in again
    again.add({"b": answer.to_dict()})
    assert len(AnswerFile(path)) == 2
    assert len(AnswerFile(path, fresh=True)) == 0


def test_answer_file_that_cannot_be_written_is_named(tmp_path):
    kept = AnswerFile(tmp_path / "answers.jsonl")
    kept.path.mkdir()
    with pytest.raises(
        CheckpointError, match=r"Cannot write answers to .*answers.jsonl: .*--cache"
    ):
        kept.add({"a": 1})


def test_answers_of_another_format_version_are_ignored(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"v":1,"key":"a","value":1}\nno json\n{"v":2,"key":"b","value":2}\n')
    assert len(AnswerFile(path)) == 1


@torch.inference_mode()
def test_head_of_a_known_model_is_one_product(model):
    prediction = model.predict([[5, 6, 7]])[0]
    logits = functional.linear(prediction.states, model.head.weight)
    assert torch.allclose(logits, prediction.logits, atol=1e-5)
