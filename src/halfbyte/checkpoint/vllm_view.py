"""Predict how vLLM interprets a checkpoint: which linears are quantized, and how they are split.

vLLM decides by the config, never by the tensors; a wrong decision fails at loading or, worse, goes
unnoticed.

Source:
    vLLM ``quantization/auto_gptq.py`` and ``quantization/utils/gptq_utils.py``
    (``is_layer_gptq_quantized``, ``get_dynamic_override``, ``override_config``,
    ``normalize_and_validate_gptq_desc_act``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.checkpoint.consumers import REPLICATED_NAMES, ROW_PARALLEL_NAMES
from halfbyte.checkpoint.dynamic import FUSED_LINEARS, resolve_dynamic
from halfbyte.checkpoint.labels import QuantizationLabels
from halfbyte.checkpoint.layout import LinearLayout
from halfbyte.quant_config import PER_CHANNEL

_EXPERT = re.compile(r"(?P<container>.+\.experts)\.\d+\..+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """The sizes in ``config.json`` that determine how tensor parallelism splits a model."""

    hidden_size: int | None
    num_heads: int | None
    num_kv_heads: int | None

    @classmethod
    def from_config(cls, model_config: Mapping[str, Any]) -> ModelSizes:
        """Find the sizes under their usual names, at the top or in ``text_config``."""
        text_config = model_config.get("text_config")
        places = [model_config, text_config if isinstance(text_config, dict) else {}]

        def find(*names: str) -> int | None:
            found = (place.get(name) for place in places for name in names)
            return next((value for value in found if type(value) is int and value > 0), None)

        heads = find("num_attention_heads", "n_head", "num_heads")
        return cls(
            hidden_size=find("hidden_size", "n_embd", "d_model"),
            num_heads=heads,
            num_kv_heads=find("num_key_value_heads") or heads,
        )

    def explain_heads(self, tensor_parallel: int) -> str | None:
        """Explain why the attention heads cannot be split over the devices; None if they can."""
        if self.num_heads and self.num_heads % tensor_parallel:
            return (
                f"{self.num_heads} attention heads cannot be split over {tensor_parallel} devices"
            )
        kv_heads = self.num_kv_heads
        if kv_heads and kv_heads % tensor_parallel and tensor_parallel % kv_heads:
            return f"{kv_heads} key-value heads cannot be split over {tensor_parallel} devices"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmView:
    """The settings that vLLM uses for one linear."""

    bits: int | None
    group_size: int | None
    symmetric: bool | None


def find_fused_siblings(module: str, existing: Mapping[str, object]) -> tuple[str, tuple[str, ...]]:
    """Find the linears that vLLM fuses with a module, and the name of the fused linear.

    Args:
        module: Full dotted name.
        existing: Every linear of the model by name, quantized or not.

    Returns:
        vLLM's name, and the names on disk of all its parts; the module alone if it is not fused.
    """
    parent, dot, leaf = module.rpartition(".")
    for fused, parts in FUSED_LINEARS.items():
        siblings = tuple(f"{parent}{dot}{part}" for part in parts)
        if leaf in parts and all(sibling in existing for sibling in siblings):
            return f"{parent}{dot}{fused}", siblings
    return module, (module,)


def view_linear(
    labels: QuantizationLabels,
    module: str,
    existing: Mapping[str, object],
    packed: Mapping[str, object],
) -> VllmView | None:
    """Determine the settings that vLLM uses for a linear.

    Args:
        labels: The config.
        module: Full dotted name.
        existing: Every linear of the model by name, quantized or not.
        packed: The linears that are quantized on disk; used if the config lists none.

    Returns:
        The settings; None if vLLM loads it in 16 bits.
    """
    listed = labels.modules_in_block or tuple(packed)
    prefix, siblings = find_fused_siblings(module, existing)
    expert = _EXPERT.fullmatch(module)
    if expert:
        prefix = expert["container"]
    elif not all(any(name in sibling for name in listed) for sibling in siblings):
        return None
    overrides = resolve_dynamic(labels.dynamic, prefix)
    if overrides is None:
        return None
    return VllmView(
        bits=overrides.get("bits", labels.bits),
        group_size=overrides.get("group_size", labels.group_size),
        symmetric=overrides.get("sym", labels.symmetric),
    )


def declares_act_order(labels: QuantizationLabels) -> bool:
    """Return whether the config or one of its rules sets desc_act, which vLLM 0.32 rejects."""
    rules = [
        rule
        for pattern, rule in labels.dynamic.items()
        if not pattern.startswith("-:") and isinstance(rule, Mapping)
    ]
    return any(
        rule.get("desc_act", labels.desc_act)
        and rule.get("group_size", labels.group_size) != PER_CHANNEL
        for rule in [{}, *rules]
    )


def split_linear(
    module: str, layout: LinearLayout, sizes: ModelSizes, tensor_parallel: int
) -> tuple[float, float]:
    """Compute a linear's sizes on one device.

    Args:
        module: Full dotted name.
        layout: Its whole sizes.
        sizes: Of the model; key-value heads are not split below one.
        tensor_parallel: Number of devices.

    Returns:
        in and out features on one device; a fraction where they cannot be split evenly.
    """
    in_features, out_features = float(layout.in_features), float(layout.out_features)
    leaf = module.rpartition(".")[2]
    if tensor_parallel == 1 or leaf in REPLICATED_NAMES:
        return in_features, out_features
    if _is_row_parallel(leaf, layout, sizes):
        return in_features / tensor_parallel, out_features
    parts = tensor_parallel
    if leaf in ("k_proj", "v_proj") and sizes.num_kv_heads:
        parts = min(tensor_parallel, sizes.num_kv_heads)
    return in_features, out_features / parts


def _is_row_parallel(leaf: str, layout: LinearLayout, sizes: ModelSizes) -> bool:
    """Return whether a linear writes to the residual stream without reading from it."""
    reads = layout.in_features == sizes.hidden_size
    writes = layout.out_features == sizes.hidden_size
    if sizes.hidden_size is None or reads == writes:
        return leaf in ROW_PARALLEL_NAMES
    return writes
