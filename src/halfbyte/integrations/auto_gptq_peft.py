"""AutoGPTQ's function for adapters, implemented with PEFT.

Source:
    AutoGPTQ 0.7 ``utils/peft_utils.py``, for names, order and defaults of the arguments.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from halfbyte.errors import ConfigError
from halfbyte.integrations.auto_gptq import AutoGPTQForCausalLM

if TYPE_CHECKING:
    from peft import PeftConfig


def get_gptq_peft_model(
    model: AutoGPTQForCausalLM,
    peft_config: PeftConfig | None = None,
    model_id: str | None = None,
    adapter_name: str = "default",
    auto_find_all_linears: bool = True,
    train_mode: bool = False,
) -> Any:
    """Add a new adapter to a quantized model, or load one.

    Args:
        model: The model.
        peft_config: Settings of the new adapter.
        model_id: Folder of the adapter to load, or its name on the Hub.
        adapter_name: Name of the adapter in the model.
        auto_find_all_linears: Adapt all linears except the head (LoRA and AdaLoRA), whatever
            ``peft_config`` says.
        train_mode: Add a new adapter and train it, instead of loading one.

    Returns:
        PEFT's model.

    Raises:
        ConfigError: ``peft_config`` or ``model_id`` is missing.
    """
    import peft

    needed, value = ("peft_config", peft_config) if train_mode else ("model_id", model_id)
    if value is None:
        raise ConfigError(
            f"get_gptq_peft_model with train_mode={train_mode} needs {needed}. "
            "Use train_mode=True to train a new adapter, or model_id to load one."
        )
    if not train_mode:
        return peft.PeftModel.from_pretrained(model.model, model_id, adapter_name)
    if auto_find_all_linears and isinstance(peft_config, peft.LoraConfig):
        peft_config = copy.copy(peft_config)
        peft_config.target_modules = "all-linear"
    return peft.get_peft_model(model.model.train(), peft_config, adapter_name)
