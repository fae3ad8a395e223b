"""Adapters on a quantized model, through PEFT's ordinary path for ``nn.Linear``."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.checkpoints import tiny_llama_config, write_checkpoint
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte.errors import ModelError

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.interop,
    # PEFT calls what Transformers has deprecated.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

IDS = torch.randint(3, 128, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    halfbyte.install_transformers()
    write_checkpoint(tmp_path, tiny_llama_config(intermediate_size=128))
    return tmp_path


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def add_adapter(model, **settings):
    settings = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_on_all_linears_learns_and_is_loaded_again(folder, tmp_path, dtype):
    base = peft.prepare_model_for_kbit_training(load(folder, dtype))
    model = add_adapter(base)
    adapted = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(adapted) == 14
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder, dtype), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_merging_into_codes_is_refused(folder):
    model = add_adapter(load(folder))
    with pytest.raises(ValueError, match="Cannot merge LORA layers when the model is gptq"):
        model.merge_and_unload()


def test_merging_is_refused_where_the_mark_was_removed(folder):
    base = load(folder)
    del base.quantization_method
    base.is_quantized = False
    model = add_adapter(base)
    with pytest.raises(ModelError, match="Cannot write to the weight of a quantized linear"):
        model.merge_and_unload()


def test_dora_reads_the_weight(folder):
    model = add_adapter(load(folder), use_dora=True)
    model(IDS, labels=IDS).loss.backward()


def test_initialisation_that_changes_the_weight_is_refused(folder):
    with pytest.raises(ModelError, match="Cannot write to the weight of a quantized linear"):
        add_adapter(load(folder), init_lora_weights="pissa", target_modules=["q_proj"])
