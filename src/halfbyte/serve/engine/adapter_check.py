"""Finds adapters that PEFT would load by changing the base model, which other requests use too."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

WEIGHTS_FILE = "adapter_model.safetensors"
_SEPARATE_INITIALIZATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base's weights as they are."""


def find_base_change(model: nn.Module, folder: Path, settings: Any) -> str | None:
    """Return what loading an adapter would change in the base model; None if nothing.

    Args:
        model: The base model; PEFT may have inserted other adapters.
        folder: Folder of the adapter.
        settings: The adapter's PEFT config.

    Returns:
        What would change, for a message.
    """
    if getattr(settings, "layer_replication", None):
        return "it repeats layers of the base model (layer_replication)"
    method = getattr(settings, "init_lora_weights", None)
    if method not in _SEPARATE_INITIALIZATIONS:
        return (
            f"its initialization '{method}' changes the base model's weights. Save it as an "
            "ordinary LoRA, with path_initial_model_for_weight_conversion of PEFT's save_pretrained"
        )
    name = _find_replaced_tensor(model, folder, settings)
    return name and f"its file replaces {name} of the base model"


def _find_replaced_tensor(model: nn.Module, folder: Path, settings: Any) -> str | None:
    """Return a tensor of the base to which the file gives other values, such as a bias."""
    tensors = chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    own = {_name_in_base(name): tensor for name, tensor in tensors}
    # PEFT makes a copy of every module whose name ends so.
    copied = tuple(getattr(settings, "modules_to_save", None) or ())
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dictionary
            name = _name_in_base(key.removeprefix("base_model.model."))
            tensor = own.get(name)
            if tensor is None or name.rpartition(".")[0].endswith(copied):
                continue
            if not torch.equal(file.get_tensor(key).to(tensor), tensor):
                return name
    return None


def _name_in_base(name: str) -> str:
    """Return a tensor's name without the levels that PEFT inserts around the base's modules."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")
