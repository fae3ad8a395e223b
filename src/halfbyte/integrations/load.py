"""Load a GPTQ folder through Transformers, also one that Transformers would not see as such."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from halfbyte.checkpoint.labels import read_labels
from halfbyte.errors import CheckpointError
from halfbyte.integrations.autoload import install


def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: Any = None,
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
        device: Everything on this one device.
        device_map: As Transformers takes it; not together with ``device``.
        trust_remote_code: Run the model code that the folder brings.
        **settings: Passed on to ``from_pretrained``.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: The folder is none, is no GPTQ checkpoint, or is damaged.
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
        config.quantization_config = {**read_labels(folder).raw, "quant_method": "gptq"}
    if device is not None:
        device_map = {"": device}
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model,
        config=config,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        **settings,
    )
    return loaded
