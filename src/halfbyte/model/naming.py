"""Maps tensor names on disk to names in the model by Transformers' own renaming rules.

While loading, Transformers renames keys (``block_sparse_moe`` -> ``mlp``, a missing or extra base
prefix) and merges some tensors (one per expert -> one fused). Both kinds of rules come from the
library, so no model family is special-cased here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from halfbyte.checkpoint.layout import OFFSETS, QUANTIZED_SUFFIXES


class Renaming:
    """Transformers' renaming rules for one model, applied to names only."""

    def __init__(self, model: nn.Module) -> None:
        """Get Transformers' rules for a model.

        Args:
            model: A Transformers model; its parameters may be on the meta device.
        """
        self.transforms: list[WeightTransform] = get_model_conversion_mapping(model)
        """All rules, in Transformers' order."""
        self.converters = [t for t in self.transforms if isinstance(t, WeightConverter)]
        """Those that merge or split tensors."""
        self._renamings = [t for t in self.transforms if isinstance(t, WeightRenaming)]
        self._prefix = str(getattr(model, "base_model_prefix", ""))
        self._state: Mapping[str, object] = dict(model.state_dict())

    def model_key(self, disk_key: str, *, convert: bool) -> str:
        """Return the name in the model of a tensor on disk.

        Args:
            disk_key: Name in a safetensors file.
            convert: True: apply merging and splitting too, and return the (first) parameter that
                the tensor becomes part of. False: rename only, as for packed tensors.

        Returns:
            The name in the model; no such parameter needs to exist.
        """
        converters = self.converters if convert else []
        renamed, _ = rename_source_key(
            disk_key, self._renamings, converters, self._prefix, self._state
        )
        if renamed not in self._state and disk_key in self._state:
            return disk_key
        return str(renamed)

    def keeps_packed(self, disk_module: str) -> bool:
        """Whether a module's packed tensors are renamed as its weight is.

        A rule may match the full name of the weight only.

        Args:
            disk_module: The module's name in the files.

        Returns:
            False if packed tensors of this name would not be found.
        """
        weight = apply_renamings(f"{disk_module}.weight", self._renamings)
        packed = apply_renamings(f"{disk_module}.qweight", self._renamings)
        return bool(packed == f"{weight.removesuffix('weight')}qweight")

    def parameters_of(self, disk_key: str) -> list[str]:
        """Return every parameter that a tensor on disk becomes, or becomes part of.

        Args:
            disk_key: Name in a safetensors file.

        Returns:
            The names, that of :meth:`model_key` first; three for a fused q, k and v.
        """
        first = self.model_key(disk_key, convert=True)
        _, source = rename_source_key(
            disk_key, self._renamings, self.converters, self._prefix, self._state
        )
        rule = next((c for c in self.converters if source in c.source_patterns), None)
        if rule is None:
            return [first]
        before, target, after = first.rpartition(rule.target_patterns[0])
        return [f"{before}{other}{after}" for other in rule.target_patterns] if target else [first]


def module_key_map(model: nn.Module, disk_keys: Iterable[str]) -> dict[str, str]:
    """Map tensor names on disk to names in the model.

    Packed tensors (``.qweight`` …) follow the renaming of the ``.weight`` they replace and are
    never merged or split.

    Args:
        model: A Transformers model, possibly on the meta device, before or after linears were
            replaced.
        disk_keys: Tensor names in safetensors files.

    Returns:
        Model names by disk name.
    """
    rules = Renaming(model)
    keys = {}
    # Natural order, because some of Transformers' rules depend on earlier keys.
    for key in sorted(disk_keys, key=dot_natural_key):
        module, _, suffix = key.rpartition(".")
        if suffix in (*QUANTIZED_SUFFIXES, OFFSETS):
            renamed = rules.model_key(f"{module}.weight", convert=False)
            keys[key] = f"{renamed.removesuffix('.weight')}.{suffix}"
        else:
            keys[key] = rules.model_key(key, convert=False)
    return keys
