"""The loader for ``quant_method: "gptq"`` in Transformers; needs neither gptqmodel nor optimum.

::

    config.json ──> GPTQConfig (every key kept) ──> GptqQuantizer
    headers of the files ──> which linears are packed, in which layout ──> QuantLinear modules
    Transformers loads the tensors unchanged ──> values checked, kernels selected

What is quantized is read from the tensor files, not from the config, so skipped layers, mixed bits,
a quantized head and experts need no lists of patterns.

Only light modules are imported at the top, because this module is imported during the import of
Transformers.

Source:
    Transformers 5.24, ``quantizers/auto.py``, ``quantizers/base.py``, ``modeling_utils.py``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import shutil
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils import quantization_config as stock

from halfbyte.checkpoint.layout import CONFIG_ALIASES, CONFIG_FILES, METHOD, OWN_METHOD

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class GPTQConfig(stock.GPTQConfig):
    """The quantization config of a checkpoint, with every key of its file.

    Transformers compares classes by name, so this one has the same name as the original.
    """

    replaced: ClassVar[type | None] = None
    """The entry in Transformers' table before."""

    def __init__(self, bits: int | None = None, **settings: Any) -> None:
        """Store the keys of ``quantization_config`` unchanged.

        Args:
            bits: Bits per weight; older files call it ``w_bit``.
            **settings: All other keys, including those unknown to Transformers.
        """
        if bits is not None:
            settings = {"bits": bits, **settings}
        self.method = settings.get("quant_method", METHOD)
        self.stored = {key: value for key, value in settings.items() if key != "quant_method"}
        known = inspect.signature(stock.GPTQConfig.__init__).parameters
        named = {CONFIG_ALIASES.get(key, key): value for key, value in settings.items()}
        named.setdefault("bits", 4)
        dialect = named.get("checkpoint_format")
        if dialect is not None:
            named["format"] = str(dialect)
        super().__init__(**{k: v for k, v in named.items() if k in known and v is not None})

    def post_init(self) -> None:
        """Skip Transformers' checks, which need optimum; the checkpoint reader checks instead."""
        if getattr(self, "backend", None) is None:
            self.backend = "auto"

    def to_dict(self) -> dict[str, Any]:
        """Return the keys as they were read."""
        return {"quant_method": self.method, **copy.deepcopy(self.stored)}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the keys as they were read."""
        return self.to_dict()


class GptqQuantizer(HfQuantizer):
    """Replaces a model's linears before its weights are loaded, and selects kernels afterwards."""

    replaced: ClassVar[type | None] = None
    """The entry in Transformers' table before."""

    requires_calibration = False
    disk_names: Mapping[str, str] = MappingProxyType({})
    """Names of the packed linears on disk, by name in the model."""
    disk_keys: tuple[str, ...] = ()
    quantized: Path | None = None
    """Temporary folder of a model that was quantized in order to load it."""

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: ``torch.compile`` sees one op per linear."""
        return True

    def is_serializable(self) -> bool:
        """Return True: ``save_pretrained`` writes the standard format."""
        return True

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Set the file name of the weights if it is not one that Transformers looks for.

        This is the only hook that receives the model's config before its files are resolved and
        its modules created. So the model is also quantized here, if the user asked for it.

        Args:
            config: The model's config.

        Returns:
            The same config, with ``transformers_weights`` set if needed.
        """
        from halfbyte.nn.model_loading import find_unusual_file

        name = getattr(config, "name_or_path", None)
        if name and not self.pre_quantized and self.quantization_config.dataset is not None:
            from halfbyte.integrations.quantize_on_load import quantize_for_loading

            self.quantized = quantize_for_loading(name, self.quantization_config)
            # With this quantizer, which the model keeps: what is on disk is read as long.
            weakref.finalize(self, shutil.rmtree, self.quantized.parent, ignore_errors=True)
            return config
        folder = Path(getattr(config, "name_or_path", None) or "")
        if getattr(config, "transformers_weights", None) is None and folder.name:
            name = find_unusual_file(folder)
            if name is not None:
                config.transformers_weights = name
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        """Read the headers of the files and replace the packed linears of the model."""
        from halfbyte.nn import model_loading
        from halfbyte.nn.replace import replace_linears

        names: list[str] = kwargs.get("checkpoint_files") or []
        if self.quantized is not None:
            from halfbyte.integrations.quantize_on_load import check_quantized_files

            check_quantized_files(model.config.name_or_path, names)
            self._load_instead(self.quantized, names)
        files = [Path(file) for file in names]
        found = model_loading.collect_linears(model, files)
        self.pre_quantized = True
        self.disk_names, self.disk_keys = found.disk_names, found.disk_keys
        model_loading.untie(model, found.stored)
        replace_linears(model, found.stored, dtype=kwargs.get("dtype") or model.dtype)
        return model

    def _load_instead(self, folder: Path, names: list[str]) -> None:
        """Let Transformers load a checkpoint in place of the files that it has resolved."""
        from halfbyte.checkpoint.labels import read_labels
        from halfbyte.checkpoint.shards import TensorFiles

        # Transformers reads the files of this list later.
        names[:] = [str(file) for file in TensorFiles.open(folder).files]
        self.quantization_config = GPTQConfig(**read_labels(folder).raw)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        """Check the loaded values, select the kernels, and prepare for adapters."""
        from halfbyte.integrations.peft import refuse_modules_to_save
        from halfbyte.nn.model_loading import prepare_linears

        prepare_linears(model)
        refuse_modules_to_save()
        return model

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel
    ) -> list[Any]:
        """Adapt Transformers' renaming rules so that every packed tensor reaches its module.

        Args:
            weight_conversions: Transformers' rules for this model.
            model: The model with its linears replaced.

        Returns:
            The adapted rules.
        """
        from halfbyte.model.renaming import align_renamings

        return align_renamings(model, weight_conversions, self.disk_names, self.disk_keys)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> Any:
        """Convert the model's quantized linears to ordinary ones, and its other weights' dtype."""
        from halfbyte.nn.replace import dequantize_linears

        computed = model.dtype
        # Transformers passes the dtype of the config, which is a string after save_pretrained.
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype or computed
        dequantize_linears(model, wanted)
        for parameter in model.parameters():
            # Parameters in another dtype, such as float32 norms, are so on purpose.
            if parameter.dtype == computed:
                parameter.data = parameter.data.to(wanted)
        return model


def fill_table(table: ModuleType) -> None:
    """Replace the GPTQ entries of Transformers' table; idempotent.

    Args:
        table: The module ``transformers.quantizers.auto``.
    """
    if is_in_table(table):
        return
    GptqQuantizer.replaced = table.AUTO_QUANTIZER_MAPPING.get(METHOD)
    GPTQConfig.replaced = table.AUTO_QUANTIZATION_CONFIG_MAPPING.get(METHOD)
    table.AUTO_QUANTIZER_MAPPING[METHOD] = GptqQuantizer
    table.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = GPTQConfig
    # Its config then selects the quantizer "gptq" as usual.
    table.AUTO_QUANTIZATION_CONFIG_MAPPING[OWN_METHOD] = GPTQConfig
    _replace_chooser(table, _adopt_labels(table.get_hf_quantizer))


def restore_table(table: ModuleType) -> None:
    """Undo :func:`fill_table`.

    Args:
        table: The module ``transformers.quantizers.auto``.
    """
    if is_in_table(table):
        table.AUTO_QUANTIZER_MAPPING[METHOD] = GptqQuantizer.replaced
        table.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = GPTQConfig.replaced
        del table.AUTO_QUANTIZATION_CONFIG_MAPPING[OWN_METHOD]
        _replace_chooser(table, table.get_hf_quantizer.__wrapped__)


def is_in_table(table: ModuleType) -> bool:
    """Whether the table's GPTQ entries are halfbyte's."""
    return table.AUTO_QUANTIZER_MAPPING.get(METHOD) is GptqQuantizer


def _replace_chooser(table: ModuleType, chooser: Callable[..., Any]) -> None:
    """Replace the function that chooses a quantizer, also where it is imported already."""
    for module in (table, sys.modules.get("transformers.modeling_utils")):
        if module is not None:
            module.get_hf_quantizer = chooser  # type: ignore[attr-defined]


def _adopt_labels(choose: Callable[..., Any]) -> Callable[..., Any]:
    """Let Transformers find the quantization config of local folders that have it in another file.

    It reads only ``config.json``, and would initialize such a model's linears randomly. It has no
    hook for models without a quantization config.
    """

    @functools.wraps(choose)
    def choose_with_labels(
        config: PretrainedConfig, quantization_config: Any, *args: Any, **settings: Any
    ) -> Any:
        from halfbyte.checkpoint.labels import read_labels
        from halfbyte.nn.model_loading import has_packed_linears

        folder = Path(getattr(config, "name_or_path", None) or "")
        if (
            quantization_config is None
            and getattr(config, "quantization_config", None) is None
            and any((folder / name).is_file() for name in CONFIG_FILES if folder.name)
            and has_packed_linears(folder)
        ):
            config.quantization_config = {"quant_method": METHOD, **read_labels(folder).raw}
        return choose(config, quantization_config, *args, **settings)

    return choose_with_labels
