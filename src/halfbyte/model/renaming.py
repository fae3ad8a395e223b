"""Adapts Transformers' renaming rules to checkpoints with packed tensors.

The rules assume that all weights are named ``.weight`` and that all experts are fused. A quantized
checkpoint can break them in two ways, each of which would drop a tensor with only a warning. A rule
may not match ``.qweight``: such a checkpoint is refused. And a rule may merge an unquantized expert
linear into a fused parameter that no longer exists: such tensors are excluded from the rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_renamings,
    rename_source_key,
)

from halfbyte.errors import CheckpointError


class ExcludingConverter(WeightConverter):
    """A conversion rule of Transformers that skips some tensors."""

    __slots__ = ("excluded",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Create the rule with WeightConverter's arguments; nothing is excluded at first."""
        super().__init__(*args, **kwargs)
        self.excluded: frozenset[str] = frozenset()

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Rename as WeightConverter does, unless the tensor is excluded."""
        if source_key in self.excluded:
            return source_key, None
        renamed: tuple[str, str | None] = super().rename_source_key(source_key)
        return renamed


def align_renamings(
    model: PreTrainedModel,
    conversions: Sequence[WeightTransform],
    disk_names: Mapping[str, str],
    disk_keys: Iterable[str],
) -> list[WeightTransform]:
    """Adapt Transformers' rules so that every tensor on disk reaches its place in the model.

    Args:
        model: The model, with its linears already replaced.
        conversions: Transformers' rules for this model.
        disk_names: Names on disk of the packed linears, by name in the model.
        disk_keys: Names of all tensors on disk.

    Returns:
        The rules, modified only where needed.

    Raises:
        CheckpointError: A packed tensor would be renamed wrongly; names source and target.
    """
    state = model.state_dict()
    renamings = [rule for rule in conversions if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in conversions if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix

    def place(key: str, rules: list[WeightConverter]) -> str:
        name, _ = rename_source_key(key, renamings, rules, prefix, state)
        return key if name not in state and key in state else str(name)

    for name, disk_name in disk_names.items():
        found = place(f"{disk_name}.qweight", converters)
        if found != f"{name}.qweight":
            raise CheckpointError(
                f"Cannot load {disk_name}.qweight: Transformers would rename it to {found}, but it "
                f"belongs to {name}.qweight. Load it with another version of Transformers than "
                f"{transformers.__version__}, and please report the model."
            )
    if not converters:
        return list(conversions)
    excluded = frozenset(
        apply_renamings(key, renamings)
        for key in disk_keys
        if place(key, converters) not in state and place(key, []) in state
    )
    return [_exclude(rule, excluded) for rule in conversions] if excluded else list(conversions)


def _exclude(rule: WeightTransform, excluded: frozenset[str]) -> WeightTransform:
    if not isinstance(rule, WeightConverter):
        return rule
    converter = ExcludingConverter(
        list(rule._original_source_patterns),
        list(rule._original_target_patterns),
        list(rule.operations),
        force_cpu=rule.force_cpu,
    )
    converter.scope_prefix, converter.base_model_prefix = rule.scope_prefix, rule.base_model_prefix
    converter.excluded = excluded
    return converter
