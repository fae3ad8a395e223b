"""Where Transformers' renaming rules go wrong for packed tensors, and what is added to them.

The rules are written for models whose tensors are all called ``.weight`` and whose experts are all
fused. Two things can differ in a quantized checkpoint, and both would leave a tensor out with no
more than a warning: a rule that does not fire for ``.qweight`` (refused), and a dense expert linear
beside packed ones, which a rule would still merge into a fused parameter that is gone (spared).
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


class SparingConverter(WeightConverter):
    """A rule of Transformers that leaves some tensors alone."""

    __slots__ = ("spared",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what WeightConverter takes; nothing is spared at first."""
        super().__init__(*args, **kwargs)
        self.spared: frozenset[str] = frozenset()

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Rename as usual, unless the tensor is spared."""
        if source_key in self.spared:
            return source_key, None
        renamed: tuple[str, str | None] = super().rename_source_key(source_key)
        return renamed


def align_renamings(
    model: PreTrainedModel,
    conversions: Sequence[WeightTransform],
    disk_names: Mapping[str, str],
    disk_keys: Iterable[str],
) -> list[WeightTransform]:
    """Make Transformers' rules bring every tensor of the files to its place in the model.

    Args:
        model: With its linears replaced.
        conversions: Transformers' rules for this model.
        disk_names: Module in the model -> module on disk, of the packed linears.
        disk_keys: Every tensor of the files.

    Returns:
        The rules, changed only where one does not fit.

    Raises:
        CheckpointError: A packed tensor would not get to its place; names both.
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
    spared = frozenset(
        apply_renamings(key, renamings)
        for key in disk_keys
        if place(key, converters) not in state and place(key, []) in state
    )
    return [_spare(rule, spared) for rule in conversions] if spared else list(conversions)


def _spare(rule: WeightTransform, spared: frozenset[str]) -> WeightTransform:
    if not isinstance(rule, WeightConverter):
        return rule
    sparing = SparingConverter(
        list(rule._original_source_patterns),
        list(rule._original_target_patterns),
        list(rule.operations),
        force_cpu=rule.force_cpu,
    )
    sparing.scope_prefix, sparing.base_model_prefix = rule.scope_prefix, rule.base_model_prefix
    sparing.spared = spared
    return sparing
