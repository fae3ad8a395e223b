"""PEFT adapters for tiny checkpoints."""

from __future__ import annotations

import peft
import torch
from transformers import AutoModelForCausalLM


def load(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def write_adapter(base, folder, *, size=0.2, **settings):
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], **settings}
    torch.manual_seed(0)
    model = peft.get_peft_model(
        load(base, torch.float32), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=size)
    model.save_pretrained(folder)
    return folder
