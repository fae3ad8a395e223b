"""AutoGPTQ's quantization config, and its options that have no effect here.

Source:
    AutoGPTQ 0.7 ``quantization/config.py``, for names, order and defaults.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch

from halfbyte.checkpoint.labels import read_labels
from halfbyte.checkpoint.layout import CONFIG_FILES, FORMAT_V1
from halfbyte.errors import ConfigError
from halfbyte.machine.devices import resolve_device
from halfbyte.quant_config import QuantConfig
from halfbyte.quantize.source import HubOptions, find_model

logger = logging.getLogger("halfbyte")

IGNORED_FLAGS = frozenset(
    (
        *("low_cpu_mem_usage", "use_triton", "use_tritonv2", "use_qigen", "use_marlin"),
        *("use_cuda_fp16", "inject_fused_attention", "inject_fused_mlp", "warmup_triton"),
        *("disable_exllama", "disable_exllamav2", "quantize_config", "strict"),
        *("use_safetensors", "checkpoint_format", "resume_download", "_commit_hash"),
        "_raise_exceptions_for_missing_entries",
    )
)
"""Options of ``from_quantized`` without effect: halfbyte chooses kernels and files itself."""

OLD_NAMES = {"torch_dtype": "dtype", "use_auth_token": "token"}


@dataclass
class BaseQuantizeConfig:
    """Quantization settings, with AutoGPTQ's names, order and defaults."""

    bits: int = 4
    group_size: int = -1
    damp_percent: float = 0.01
    desc_act: bool = True
    static_groups: bool = False
    sym: bool = True
    true_sequential: bool = True
    quant_method: str = "gptq"
    checkpoint_format: str = FORMAT_V1
    model_name_or_path: str | None = None
    model_file_base_name: str | None = None

    def __post_init__(self) -> None:
        if (self.quant_method, self.checkpoint_format) != ("gptq", FORMAT_V1):
            raise ConfigError(
                f"BaseQuantizeConfig has quant_method '{self.quant_method}' and checkpoint_format "
                f"'{self.checkpoint_format}'; only 'gptq' and '{FORMAT_V1}' are supported."
            )
        if not self.true_sequential:
            warn_ignored("BaseQuantizeConfig", ["true_sequential"])
        self.to_quant_config()

    def to_quant_config(self) -> QuantConfig:
        """Convert to a :class:`QuantConfig`."""
        return QuantConfig(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.sym,
            # With static groups, act-order only affects the rounding, and g_idx stays trivial.
            desc_act=self.desc_act and not self.static_groups,
            damping=self.damp_percent,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON-serializable dict."""
        return asdict(self)

    def save_pretrained(self, save_dir: str | Path, **options: Any) -> None:
        """Write ``quantize_config.json``.

        Args:
            save_dir: Folder to write to.
            **options: Unused.
        """
        folder = Path(save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (folder / CONFIG_FILES[0]).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, save_dir: str | Path, **options: Any) -> Self:
        """Read the quantization config of a folder.

        Args:
            save_dir: The folder of a checkpoint, or its name on the Hub.
            **options: Settings for downloading it, such as ``revision``.

        Returns:
            The config, with AutoGPTQ's defaults for missing values.
        """
        hub, _ = HubOptions.split(rename_deprecated(options))
        labels = read_labels(find_model(save_dir, hub))
        damping = labels.raw.get("damp_percent")
        known: dict[str, Any] = {
            "bits": labels.bits,
            "group_size": labels.group_size,
            "sym": labels.symmetric,
            "desc_act": labels.desc_act,
            # Only informative in a checkpoint, so an invalid value must not prevent loading.
            "damp_percent": damping if isinstance(damping, float) and 0 < damping < 1 else None,
            "static_groups": labels.raw.get("static_groups"),
        }
        return cls(**{key: value for key, value in known.items() if value is not None})


def warn_ignored(where: str, names: Iterable[str]) -> None:
    """Warn that options of AutoGPTQ have no effect.

    Args:
        where: The call that they were passed to.
        names: Names of the options.
    """
    logger.warning(
        "%s: these AutoGPTQ options have no effect: %s. halfbyte chooses files and kernels itself "
        "(see halfbyte doctor).",
        where,
        ", ".join(names),
    )


def exllama_set_max_input_length(model: Any, max_input_length: int) -> Any:
    """Do nothing: no kernel here has buffers of a fixed length.

    Args:
        model: A quantized model.
        max_input_length: No effect.

    Returns:
        The same model.
    """
    warn_ignored("exllama_set_max_input_length", ["max_input_length"])
    return model


def find_device(device: str | int | torch.device | None) -> torch.device:
    """Find a device, which in AutoGPTQ can also be the number of a GPU.

    Args:
        device: The device; None: the first GPU, or the CPU.

    Returns:
        The device.
    """
    if isinstance(device, int):
        device = f"cuda:{device}"
    return resolve_device("auto" if device is None else device)


def rename_deprecated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rename deprecated settings to their names in Transformers 5.

    Args:
        settings: Settings for loading a model.

    Returns:
        The settings under their current names.
    """
    return {OLD_NAMES.get(name, name): value for name, value in settings.items()}
