"""Load a folder through Transformers, also a GPTQ one that Transformers would not see as such."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from halfbyte.checkpoint.labels import read_labels
from halfbyte.checkpoint.layout import METHOD
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.integrations.activations import round_activations
from halfbyte.integrations.autoload import install
from halfbyte.machine.arithmetic import has_fast_bf16
from halfbyte.machine.devices import resolve_device


def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
    activations: str = "float",
    trust_remote_code: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """Load a quantized causal language model.

    Beyond what ``AutoModelForCausalLM.from_pretrained`` does after ``import halfbyte``, it takes
    old checkpoints whose quantization config stands in ``quantize_config.json`` only, and it uses
    halfbyte's loader whatever ``HALFBYTE_TRANSFORMERS`` says.

    Args:
        model: A folder, or the name of a repository on the Hub.
        dtype: To compute in; "auto": as ``config.json`` says.
        device: Everything on this one device; "auto": the first GPU, or the CPU.
        device_map: As Transformers takes it; not together with ``device``.
        activations: "int8": on a CPU, quantized layers round their input to 8 bits, group by
            group: faster where arithmetic takes the time, and less exact
            (:mod:`halfbyte.kernels.cpu_int8`).
        trust_remote_code: Run the model code that the folder brings.
        **settings: Passed on to ``from_pretrained``.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: The folder is none, is no GPTQ checkpoint, or is damaged.
        ConfigError: There is no such device, or no layer can take such activations.
    """
    install()
    folder = Path(model)
    if folder.exists() and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"Cannot load {folder}: it has no config.json, which says what model it is. "
            "Copy config.json and the tokenizer files of the base model into it."
        )
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    if folder.is_dir() and getattr(config, "quantization_config", None) is None:
        config.quantization_config = {"quant_method": METHOD, **read_labels(folder).raw}
    if device is not None:
        device_map = {"": resolve_device(device)}
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model,
        config=config,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        **settings,
    )
    round_activations(loaded, activations)
    return loaded


def load_model(
    folder: Path, *, dtype: str = "auto", device: str = "auto", activations: str = "float"
) -> PreTrainedModel:
    """Load a model to run it, quantized or not.

    Args:
        folder: Of the model.
        dtype: A torch dtype's name; "auto": on a CPU bfloat16 where that is fast, else float32;
            elsewhere as stored.
        device: A torch device's name; "auto": the first GPU, or the CPU.
        activations: As in :func:`load`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ConfigError: There is no such folder or device, or no layer can take such activations.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"'{folder}' is no model folder: it has no config.json.")
    # Its bar for reading a file would come in between.
    logging.disable_progress_bar()
    place = resolve_device(device)
    if dtype == "auto" and place.type == "cpu":
        dtype = "bfloat16" if has_fast_bf16() else "float32"
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    config = AutoConfig.from_pretrained(folder)
    # Old checkpoints have their quantization config in a file of its own.
    if getattr(config, "quantization_config", None) or (folder / "quantize_config.json").is_file():
        return load(folder, dtype=kind, device=place, activations=activations)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=kind, device_map={"": place}
    )
    round_activations(loaded, activations)
    return loaded
