"""Drop-in replacement for AutoGPTQ: its public names under ``halfbyte.auto_gptq``."""

from __future__ import annotations

from halfbyte.integrations.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from halfbyte.integrations.auto_gptq_config import exllama_set_max_input_length
from halfbyte.integrations.auto_gptq_peft import get_gptq_peft_model

__all__ = [
    "AutoGPTQForCausalLM",
    "BaseQuantizeConfig",
    "exllama_set_max_input_length",
    "get_gptq_peft_model",
]
