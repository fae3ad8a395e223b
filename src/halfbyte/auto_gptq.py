"""AutoGPTQ's classes under the name that its users know: change the import, nothing else."""

from __future__ import annotations

from halfbyte.integrations.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

__all__ = ["AutoGPTQForCausalLM", "BaseQuantizeConfig"]
