"""Drop-in replacement for AutoGPTQ: the same classes under ``halfbyte.auto_gptq``."""

from __future__ import annotations

from halfbyte.integrations.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

__all__ = ["AutoGPTQForCausalLM", "BaseQuantizeConfig"]
