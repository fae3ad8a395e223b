"""Load a model through Transformers, including old GPTQ checkpoints that it does not recognize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from halfbyte.checkpoint.labels import describe_missing_config, read_labels
from halfbyte.checkpoint.layout import CONFIG_FILES, METHOD
from halfbyte.checkpoint.safe_path import check_model_file
from halfbyte.checkpoint.shards import explain_missing_weights
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.evaluate.loading import explain_loading
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
    weights_file: str | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """Load a quantized causal language model.

    In addition to what ``AutoModelForCausalLM.from_pretrained`` does after ``import halfbyte``,
    this loads old checkpoints whose quantization config is only in ``quantize_config.json``, raises
    an error for missing tensors, and uses halfbyte's loader whatever ``HALFBYTE_TRANSFORMERS`` is.

    Args:
        model: A folder, or the name of a repository on the Hub.
        dtype: Dtype to compute in; "auto": that of ``config.json``.
        device: Device for the whole model; "auto": the first GPU, or the CPU.
        device_map: As in Transformers; not together with ``device``.
        activations: "int8": on a CPU, quantized layers round their input to 8 bits per group:
            faster where arithmetic is the bottleneck, and less exact
            (:mod:`halfbyte.kernels.cpu_int8`).
        weights_file: Name of the safetensors file or index to read, for a folder that holds several
            checkpoints; None: the usual one.
        trust_remote_code: Run model code from the folder.
        **settings: ``revision``, ``subfolder``, ``cache_dir``, ``token``, ``local_files_only`` and
            ``force_download`` select the files; others are passed to ``from_pretrained``.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError: There is no such folder, and it cannot be downloaded.
        CheckpointError: The folder is not a GPTQ checkpoint, lacks tensors, or is damaged.
        ConfigError: There is no such device, ``device_map`` is given too, or no layer supports int8
            activations.
    """
    if device is not None and device_map is not None:
        raise ConfigError(
            f"Cannot load {model}: device is {str(device)!r} and device_map is {device_map!r}. "
            "Give device for the whole model, or device_map for its parts."
        )
    install()
    hub, settings = HubOptions.split(settings)
    folder = find_model(model, hub, with_code=trust_remote_code)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"Cannot load {folder}: {describe_missing_config(folder)}. Give the folder of a "
            "quantized model; if its config.json is lost, copy the one of the base model into it."
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is None:
        config.quantization_config = {"quant_method": METHOD, **read_labels(folder).raw}
    if weights_file is not None:
        config.transformers_weights = check_model_file(folder, weights_file).name
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
        # Adapters record their base model: use its name, not a path in this machine's cache.
        loaded.name_or_path = loaded.config.name_or_path = str(model)
    round_activations(loaded, activations)
    return loaded


def load_model(
    folder: Path, *, dtype: str = "auto", device: str = "auto", activations: str = "float"
) -> PreTrainedModel:
    """Load a quantized or ordinary model for inference.

    Args:
        folder: Folder of the model.
        dtype: Name of a torch dtype; "auto": on a CPU bfloat16 if it is fast there, otherwise
            float32; on other devices as stored.
        device: Name of a torch device; "auto": the first GPU, or the CPU.
        activations: As in :func:`load`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ConfigError: There is no such folder or device, or no layer supports int8 activations.
        CheckpointError: The folder lacks tensors, is damaged, or has its weights only in pickles.
        ModelError: Transformers cannot load it, for example because it needs another package.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"Cannot load '{folder}': {describe_missing_config(folder)}. Give a model folder."
        )
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(explain_missing_weights(folder))
    # Transformers' progress bar would mix with the command's output.
    logging.disable_progress_bar()
    place = resolve_device(device)
    if dtype == "auto" and place.type == "cpu":
        dtype = "bfloat16" if has_fast_bf16() else "float32"
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    with explain_loading(folder):
        config = AutoConfig.from_pretrained(folder)
        # Old checkpoints have their quantization config in a separate file.
        labelled = any((folder / name).is_file() for name in CONFIG_FILES)
        if getattr(config, "quantization_config", None) or labelled:
            return load(folder, dtype=kind, device=place, activations=activations)
        loaded = _load_complete(folder, dtype=kind, device_map={"": place})
    round_activations(loaded, activations)
    return loaded


def _load_complete(folder: Path, **settings: Any) -> PreTrainedModel:
    """Load a model, and raise an error for tensors that Transformers would initialize randomly."""
    loaded: PreTrainedModel
    loaded, found = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **settings
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise CheckpointError(
            f"Checkpoint {folder} is missing {missing[0]}"
            f"{f' and {len(missing) - 1} more tensors' if len(missing) > 1 else ''} of a "
            f"{type(loaded).__name__}, which would be random. Download it again, or use the "
            "config.json that belongs to it."
        )
    return loaded
