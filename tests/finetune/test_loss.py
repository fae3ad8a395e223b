from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from halfbyte.finetune import loss as loss_module
from halfbyte.finetune.adapter import attach_adapter
from halfbyte.finetune.config import AdapterConfig
from halfbyte.finetune.loss import ChunkedLoss
from halfbyte.quantize.calibration_source import IGNORED

# PEFT asks Transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "pad_token_id": 0,
}


def make_model(**changes):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).double()
    return attach_adapter(model, AdapterConfig(rank=2, dropout=0.0))


def make_batch(*, mask_prompts=True):
    torch.manual_seed(1)
    ids = torch.randint(1, 96, (3, 12))
    labels = ids.clone()
    if mask_prompts:
        labels[:, :5] = IGNORED
    labels[1, 8:] = IGNORED
    attention = torch.ones_like(ids)
    attention[1, 8:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": attention}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("values", [96, 96 * 4, 96 * 1000])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_the_models_own(monkeypatch, values, tied):
    monkeypatch.setattr(loss_module, "CHUNK_VALUES", values)
    model, batch = make_model(tie_word_embeddings=tied), make_batch()
    # B is zero in a new adapter, and A would get no gradient.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    chunked = ChunkedLoss(model)
    assert chunked.obstacle is None
    expected = model(**batch).loss
    wanted = gradients(model, expected)
    found = chunked(batch)
    # The models' own loss is computed in float32, whatever they compute in.
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-6)
    got = gradients(model, found)
    assert len(wanted) == 4 * 7
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_sum_is_divided_by_the_count_of_the_whole_step():
    model, batch = make_model(), make_batch()
    chunked, counted = ChunkedLoss(model), int((batch["labels"][:, 1:] != IGNORED).sum())
    whole = chunked(batch)
    torch.testing.assert_close(chunked(batch, 3 * counted), whole / 3)


def test_no_more_logits_than_a_chunk_and_none_for_what_is_not_counted(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_VALUES", 96 * 4)
    model, batch = make_model(), make_batch()
    chunked, rows = ChunkedLoss(model), []
    model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, output: rows.append(output.numel() // 96)
    )
    chunked(batch).backward()
    assert max(rows) == 4
    counted = int((batch["labels"][:, 1:] != IGNORED).sum())
    assert sum(rows) == 2 * counted, "each once on the way there and once on the way back"


def test_a_batch_without_counted_labels_has_a_gradient_of_zero():
    model, batch = make_model(), make_batch()
    batch["labels"][:] = IGNORED
    loss = ChunkedLoss(model)(batch, 5)
    assert loss.item() == 0
    assert not any(bool(g.any()) for g in gradients(model, loss).values())


def test_a_model_that_caps_its_logits_keeps_its_own_loss():
    torch.manual_seed(0)
    # Untied and unscaled, so that logits are large enough for the cap to tell.
    model = Gemma2ForCausalLM(Gemma2Config(**TINY, final_logit_softcapping=0.1))
    assert ChunkedLoss(model).obstacle == "the model changes its head's logits"


def test_a_model_with_a_loss_for_its_experts_keeps_its_own_loss():
    model = make_model()
    model.config.output_router_logits = True
    assert "experts" in ChunkedLoss(model).obstacle
