"""lm-eval's `local-completions` against our server: log-likelihoods match the model's own."""

from __future__ import annotations

import pytest
import torch
from tests.cli.test_serve import running
from tests.serve.helpers_engine import load_float32, write_model
from transformers import AutoTokenizer

completions = pytest.importorskip("lm_eval.models.openai_completions")
pytest.importorskip("tenacity")  # lm_eval[api]
from lm_eval.api.instance import Instance  # noqa: E402

CONTEXTS = ["The capital of France is", "1 2 3", "x"]
ENDINGS = [" Paris", " 4 5 6", "yz"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def served(model):
    with running(model, "--dtype", "float32", "--cache-gb", "0.01") as (_, address, _):
        yield completions.LocalCompletionsAPI(
            base_url=f"{address}/v1/completions",
            model="tiny",
            tokenizer=str(model),
            tokenizer_backend="huggingface",
            batch_size=3,
            max_length=256,
            max_retries=1,
        )


def rate(model, ids, start):
    """The log-likelihood of the tokens from a position on, and whether each was the argmax."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].double()
    rated = logits.log_softmax(-1)[start - 1 : -1]
    chosen = torch.tensor(ids[start:])
    total = rated[torch.arange(len(chosen)), chosen].sum().item()
    return total, bool((rated.argmax(-1) == chosen).all())


def test_likelihoods_are_the_models_own(served, model):
    own, tokenizer = load_float32(model), AutoTokenizer.from_pretrained(model)
    requests = [
        Instance("loglikelihood", {}, pair, place)
        for place, pair in enumerate(zip(CONTEXTS, ENDINGS, strict=True))
    ]
    found = served.loglikelihood(requests)
    for (context, ending), (total, greedy) in zip(
        zip(CONTEXTS, ENDINGS, strict=True), found, strict=True
    ):
        start = len(tokenizer(context)["input_ids"])
        expected, is_greedy = rate(own, tokenizer(context + ending)["input_ids"], start)
        assert total == pytest.approx(expected, abs=2e-3)
        assert greedy == is_greedy


def test_generation_stops_at_lm_evals_stop_strings(served, model):
    arguments = ("hello", {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False})
    (text,) = served.generate_until([Instance("generate_until", {}, arguments, 0)])
    own, tokenizer = load_float32(model), AutoTokenizer.from_pretrained(model)
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    with torch.inference_mode():
        greedy = own.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
    assert text == tokenizer.decode(greedy[0, ids.shape[1] :], skip_special_tokens=True)
