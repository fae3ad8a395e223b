"""Load a folder through Transformers, also a GPTQ one that Transformers would not see as such."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from halfbyte.checkpoint.labels import read_labels
from halfbyte.checkpoint.layout import CONFIG_FILES, METHOD
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.integrations.activations import round_activations
from halfbyte.integrations.autoload import install
from halfbyte.machine.arithmetic import has_fast_bf16
from halfbyte.machine.devices import resolve_device
from halfbyte.quantize.source import HubOptions, find_model


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
        **settings: ``revision``, ``subfolder``, ``cache_dir``, ``token``, ``local_files_only`` and
            ``force_download`` say which folder is meant; others are passed on to
            ``from_pretrained``.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError: There is no such folder, and it cannot be fetched.
        CheckpointError: The folder is no GPTQ checkpoint, lacks tensors, or is damaged.
        ConfigError: There is no such device, or no layer can take such activations.
    """
    install()
    hub, settings = HubOptions.split(settings)
    folder = find_model(model, hub, with_code=trust_remote_code)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"Cannot load {folder}: it has no config.json, which says what model it is. "
            "Copy config.json and the tokenizer files of the base model into it."
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is None:
        config.quantization_config = {"quant_method": METHOD, **read_labels(folder).raw}
    if device is not None:
        device_map = {"": resolve_device(device)}
    loaded = _load_complete(
        folder,
        config=config,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        **settings,
    )
    if not Path(model).is_dir():
        # Adapters note what they belong to: the name, not its place in this machine's cache.
        loaded.name_or_path = loaded.config.name_or_path = str(model)
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
        CheckpointError: The folder lacks tensors, or is damaged.
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
    labelled = any((folder / name).is_file() for name in CONFIG_FILES)
    if getattr(config, "quantization_config", None) or labelled:
        return load(folder, dtype=kind, device=place, activations=activations)
    loaded = _load_complete(folder, dtype=kind, device_map={"": place})
    round_activations(loaded, activations)
    return loaded


def _load_complete(folder: Path, **settings: Any) -> PreTrainedModel:
    """Load, and refuse what Transformers would fill with random numbers."""
    loaded: PreTrainedModel
    loaded, found = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **settings
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise CheckpointError(
            f"Checkpoint {folder} is missing {missing[0]}"
            f"{f' and {len(missing) - 1} more tensors' if len(missing) > 1 else ''} of a "
            f"{type(loaded).__name__}, which would be random. Download it again, or give the "
            "config.json that belongs to it."
        )
    return loaded
