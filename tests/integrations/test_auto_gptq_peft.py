"""AutoGPTQ's functions around its classes."""

from __future__ import annotations

import logging

import pytest
import torch
from tests.helpers.checkpoints import tiny_llama_config, write_checkpoint

from halfbyte.auto_gptq import (
    AutoGPTQForCausalLM,
    BaseQuantizeConfig,
    exllama_set_max_input_length,
    get_gptq_peft_model,
)
from halfbyte.errors import ConfigError

peft = pytest.importorskip("peft")

# PEFT calls what Transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

IDS = torch.tensor([[5, 9, 2, 77]])


@pytest.fixture
def model(tmp_path):
    write_checkpoint(tmp_path / "q4", tiny_llama_config(num_hidden_layers=1))
    return AutoGPTQForCausalLM.from_quantized(tmp_path / "q4", device="cpu", trainable=True)


def test_adapter_is_trained_and_loaded_as_in_autogptqs_example(model, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trained = get_gptq_peft_model(model, config, auto_find_all_linears=True, train_mode=True)
    adapted = {name for name, p in trained.named_parameters() if p.requires_grad}
    assert len(adapted) == 7 * 2
    assert not any("lm_head" in name for name in adapted)
    assert config.target_modules == {"q_proj"}
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    trained.save_pretrained(tmp_path / "adapter")
    again = AutoGPTQForCausalLM.from_quantized(tmp_path / "q4", device="cpu")
    loaded = get_gptq_peft_model(again, model_id=str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, trained.eval()(IDS).logits)


def test_given_modules_are_adapted_if_asked_for(model):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trained = get_gptq_peft_model(model, config, auto_find_all_linears=False, train_mode=True)
    assert sum(p.requires_grad for p in trained.parameters()) == 2


def test_model_trains_after_it_was_loaded_to_generate(tmp_path):
    write_checkpoint(tmp_path, tiny_llama_config(num_hidden_layers=1))
    model = AutoGPTQForCausalLM(tmp_path, BaseQuantizeConfig(), quantized=True)
    model.generate(input_ids=IDS, max_new_tokens=1)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM")
    trained = get_gptq_peft_model(model, config, train_mode=True)
    trained(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize(("train_mode", "missing"), [(True, "peft_config"), (False, "model_id")])
def test_missing_argument_is_an_error(model, train_mode, missing):
    with pytest.raises(ConfigError, match=f"train_mode={train_mode} needs {missing}"):
        get_gptq_peft_model(model, train_mode=train_mode)


def test_exllama_call_has_no_effect(model, caplog):
    with caplog.at_level(logging.WARNING, "halfbyte"):
        assert exllama_set_max_input_length(model, max_input_length=4096) is model
    assert "exllama_set_max_input_length: these AutoGPTQ options have no effect" in caplog.text
