from __future__ import annotations

import json

import pytest
import torch
from tests.helpers.tiny_llama import build_model, build_tokenizer

from halfbyte.judge.setup import CompareConfig
from halfbyte.judge.tasks import read_tasks

WORDS = 60


def save(folder, model):
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path):
    return save(tmp_path / "base", build_model())


@pytest.fixture
def make_candidate(tmp_path):
    """Save the base model after a change to its weights."""

    def make(change, name="candidate"):
        model = build_model()
        with torch.no_grad():
            change(model)
        return save(tmp_path / name, model)

    return make


def noise(scale, seed=0):
    def change(model):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter += scale * parameter.std() * torch.randn(parameter.shape, generator=generator)

    return change


@pytest.fixture
def words():
    generator = torch.Generator().manual_seed(3)

    def draw(count):
        return " ".join(f"w{i}" for i in torch.randint(0, WORDS, (count,), generator=generator))

    return draw


@pytest.fixture
def tasks(tmp_path, words, base):
    """Items with choices and generated answers; the base's own answers are expected."""
    from halfbyte.evaluate.loading import open_subject
    from halfbyte.judge.local_model import LocalModel
    from halfbyte.judge.questions import make_question
    from halfbyte.judge.tasks import Item

    subject = open_subject(base)
    model = LocalModel(subject)
    lines = []
    for number in range(40):
        prompt = words(6)
        if number % 2:
            line = {"prompt": prompt, "choices": [" w1", " w2", " w3 w4"], "kind": "choice"}
            item = Item(name="x", prompt=prompt, choices=tuple(line["choices"]))
            (answer,) = model.answer_choices([make_question(subject.tokenizer, item)])
            line["answer"] = max(range(3), key=lambda i: answer.choice_nats[i])
        else:
            line = {"prompt": prompt, "kind": "written", "max_new_tokens": 4}
            item = Item(name="x", prompt=prompt, max_new_tokens=4)
            (answer,) = model.write([make_question(subject.tokenizer, item)])
            line["answer"] = answer.text
        lines.append(line)
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def items(tasks):
    return read_tasks([tasks], slice_by=["kind"])


@pytest.fixture
def documents(words):
    return {"words": [words(48) for _ in range(20)]}


@pytest.fixture
def config():
    return CompareConfig(
        window=32, batch_size=4, noise_items=10, longest_edge=128, windows=None, edge_cases=False
    )
