"""Makes PEFT refuse what it would silently not train on a quantized model."""

from __future__ import annotations

from functools import cache

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from halfbyte.errors import ModelError
from halfbyte.nn.linear import QuantLinear

WRAPPER = "ModulesToSaveWrapper"
"""PEFT's class around a module of ``modules_to_save``, by name: importing PEFT takes seconds."""


@cache
def refuse_modules_to_save() -> None:
    """Refuse quantized linears in PEFT's ``modules_to_save``, from now on in this process.

    PEFT trains the parameters of a copy of such a module. A quantized linear has none, so nothing
    would be trained.
    """
    register_module_module_registration_hook(_check_wrapped)


def _check_wrapped(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    if type(parent).__name__ != WRAPPER or name != "original_module" or module is None:
        return
    for inner, linear in module.named_modules():
        if isinstance(linear, QuantLinear):
            where = f"{inner} of a {type(module).__name__}" if inner else "a linear"
            raise ModelError(
                f"PEFT's modules_to_save names {where}, {linear.in_features} -> "
                f"{linear.out_features}, which is quantized: its codes cannot be trained. Remove "
                "it from modules_to_save and put an adapter on it with target_modules, or quantize "
                "the model again without it (halfbyte quantize --skip)."
            )
